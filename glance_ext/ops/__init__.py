"""The ops, usable alone: importing them needs torch and nothing else heavy.

``partial_conv2d``, ``aggregate_patch_scores``, ``gather_holes``, ``hole_conv2d`` and
``winograd_conv2d`` have a native implementation (csrc/), and a specification in plain torch
(:mod:`glance_ext.ops.reference`); the others are composed of torch's own operators. Each has a page
in docs/ops.md.
"""

from glance_ext.ops.decompositions import decompositions
from glance_ext.ops.hole_sequence import HoleLayer, hole_sequence
from glance_ext.ops.hole_windows import gather_holes, hole_conv2d, hole_max_pool2d
from glance_ext.ops.partial_conv import partial_conv2d
from glance_ext.ops.partial_conv_nd import (
    partial_conv1d,
    partial_conv3d,
    partial_conv_transpose2d,
    soft_partial_conv2d,
)
from glance_ext.ops.patch_scores import aggregate_patch_scores
from glance_ext.ops.winograd import winograd_conv2d

__all__ = [
    "HoleLayer",
    "aggregate_patch_scores",
    "decompositions",
    "gather_holes",
    "hole_conv2d",
    "hole_max_pool2d",
    "hole_sequence",
    "partial_conv1d",
    "partial_conv2d",
    "partial_conv3d",
    "partial_conv_transpose2d",
    "soft_partial_conv2d",
    "winograd_conv2d",
]
