"""What ``glance-ext bench`` runs; benchmarks/README.md is the contract of its numbers."""

from glance_ext.bench.results import format_results, result_file_name, validate_results
from glance_ext.bench.run import SUITES, run_suite

__all__ = ["SUITES", "format_results", "result_file_name", "run_suite", "validate_results"]
