"""What NVIDIA's ``PartialConv2d`` computes, written from its description and for these tests only.

The description (Liu et al., ECCV 2018, and the layer's documentation): a convolution of ones over
the mask gives the update mask; the ratio is the window's size by the update mask plus an epsilon,
times the update mask clamped to [0, 1]; the output's part without the bias is multiplied by the
ratio, and the output with it by the clamped update mask. Without a mask all pixels count as valid.
What the layer keeps from call to call is left out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NvidiaPartialConv2d(nn.Conv2d):
    """The layer, with its constructor, its parameters and its rounding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.multi_channel = kwargs.pop("multi_channel", False)
        self.return_mask = kwargs.pop("return_mask", False)
        self.epsilon = 1e-8
        # "number / tensor" in torch is the number times a rounded reciprocal.
        self.divides_exactly = False
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor, mask_in: Tensor | None = None) -> Any:
        n, c, h, w = input.shape
        outputs, channels = (self.out_channels, c) if self.multi_channel else (1, 1)
        mask = mask_in
        if mask is None:
            mask = input.new_ones((n if self.multi_channel else 1, channels, h, w))
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        ones = input.new_ones(outputs, channels, *self.kernel_size)
        with torch.no_grad():
            count = F.conv2d(mask, ones, **geometry)
            size = ones[0].numel()
            size = torch.full_like(count, size) if self.divides_exactly else size
            ratio = size / (count + self.epsilon)
            update = count.clamp(0, 1)
            ratio = ratio * update
        shown = input if mask_in is None else input * mask
        output = F.conv2d(shown, self.weight, self.bias, groups=self.groups, **geometry)
        if self.bias is None:
            output = output * ratio
        else:
            bias = self.bias.reshape(1, -1, 1, 1)
            output = ((output - bias) * ratio + bias) * update
        return (output, update) if self.return_mask else output
