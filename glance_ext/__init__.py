"""Glancing at the Patch: anomaly localization with global and local feature comparison.

An implementation of Wang, Wu, Cui, Shen (CVPR 2021). ``glance_ext.ops`` and ``glance_ext.nn`` stand
alone; ``glance_ext.engine`` trains and detects; ``glance-ext`` is the command line.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name):
        """Looks the version up when it is asked for: that takes longer than all else here."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("glance-ext")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+unknown"
