"""Training, detection, calibration, evaluation and checkpoints."""
