"""Glancing at the Patch: anomaly localization with global and local feature comparison.

An implementation of Wang, Wu, Cui, Shen (CVPR 2021). ``glance_ext.ops`` and ``glance_ext.nn`` stand
alone; ``glance_ext.engine`` trains and detects; ``glance-ext`` is the command line.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("glance-ext")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
