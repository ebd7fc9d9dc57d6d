"""Layers: partial convolution and masked pooling, drop-in and without hidden state."""

from glance_ext.nn.hole_features import HoleFeatures, HolePlan
from glance_ext.nn.partial_conv import PartialConv2d, convert_torch_pconv_state
from glance_ext.nn.partial_conv_nd import PartialConv1d, PartialConv3d, PartialConvTranspose2d
from glance_ext.nn.pooling import MaskedMaxPool2d, masked_max_pool2d

__all__ = [
    "HoleFeatures",
    "HolePlan",
    "MaskedMaxPool2d",
    "PartialConv1d",
    "PartialConv2d",
    "PartialConv3d",
    "PartialConvTranspose2d",
    "convert_torch_pconv_state",
    "masked_max_pool2d",
]
