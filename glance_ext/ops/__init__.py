"""The ops, usable alone: importing them needs torch and nothing else heavy.

Each op has a native implementation for CPU and CUDA (csrc/), a specification in plain torch
(:mod:`glance_ext.ops.reference`), and a page in docs/ops.md.
"""

from glance_ext.ops.decompositions import decompositions
from glance_ext.ops.hole_sequence import HoleLayer, hole_sequence
from glance_ext.ops.hole_windows import gather_holes, hole_conv2d, hole_max_pool2d
from glance_ext.ops.partial_conv import partial_conv2d
from glance_ext.ops.patch_scores import aggregate_patch_scores

__all__ = [
    "HoleLayer",
    "aggregate_patch_scores",
    "decompositions",
    "gather_holes",
    "hole_conv2d",
    "hole_max_pool2d",
    "hole_sequence",
    "partial_conv2d",
]
