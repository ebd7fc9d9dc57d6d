"""Exact metrics for anomaly detection and localization: AUROC, F1Max and AUPRO.

Everything here is rank-based: every distinct score is a threshold, equal scores enter together,
and counts are integers. So any score range works, no score is squashed or binned, and the result
does not change under a strictly increasing transform of the scores. Numpy arrays in, floats and
float64 curves out; no torch. The functions hold all maps in memory; :class:`PixelStore` gives the
same figures of any number of maps in bounded memory.

A score is *anomalous when high*; a prediction at threshold ``t`` is ``score >= t``.
"""

from __future__ import annotations

from glance_ext.metrics.classification import (
    F1Max,
    ImageMetrics,
    RocCurve,
    auroc,
    f1_max,
    image_metrics,
    roc_curve,
)
from glance_ext.metrics.curves import thin
from glance_ext.metrics.exceptions import UndefinedMetricError
from glance_ext.metrics.localization import (
    PixelMetrics,
    ProCurve,
    aupro,
    pixel_metrics,
    pro_curve,
)
from glance_ext.metrics.streaming import PixelStore

__all__ = [
    "F1Max",
    "ImageMetrics",
    "PixelMetrics",
    "PixelStore",
    "ProCurve",
    "RocCurve",
    "UndefinedMetricError",
    "aupro",
    "auroc",
    "f1_max",
    "image_metrics",
    "pixel_metrics",
    "pro_curve",
    "roc_curve",
    "thin",
]
