"""The one error of this package that a caller is expected to answer."""

from __future__ import annotations

from glance_ext.errors import GlanceError


class UndefinedMetricError(GlanceError, ValueError):
    """A metric has no value on this data, because a class it compares is missing.

    A report can catch it and write null; every other ``ValueError`` of the package is a mistake
    in the input.
    """
