"""Glancing at the Patch: anomaly localization with global and local feature comparison."""
