"""``PartialConv2d``: in place of ``nn.Conv2d`` and of NVIDIA's layer of that name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.ops import partial_conv2d


class PartialConv2d(nn.Conv2d):
    """A partial convolution layer (Liu et al., ECCV 2018; Wang et al., CVPR 2021, section 3.3).

    Takes ``nn.Conv2d``'s arguments and has its ``state_dict``, so weights of ``nn.Conv2d`` and of
    NVIDIA's ``PartialConv2d`` load as they are. Keeps nothing from one call to the next. What
    differs from NVIDIA's layer, and why, is in docs/ops.md.

    Args:
        *args: ``nn.Conv2d``'s.
        multi_channel: Whether the mask has one channel for each input channel.
        return_mask: Whether to return the next layer's mask too.
        **kwargs: ``nn.Conv2d``'s.
    """

    def __init__(
        self, *args: Any, multi_channel: bool = False, return_mask: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.multi_channel = multi_channel
        self.return_mask = return_mask

    def forward(  # type: ignore[override]
        self, input: Tensor, mask_in: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolves the valid part of ``input``.

        Args:
            input: ``(N, C, H, W)``.
            mask_in: 1 = valid; ``(1 or N, C, H, W)`` for a multi-channel layer, else ``(H, W)``,
                ``(N, H, W)`` or ``(1 or N, 1, H, W)``. None means that all pixels are valid; only
                padding is missing then.

        Returns:
            The output ``(N, K, Ho, Wo)``, and with ``return_mask`` the next mask, see
            :func:`glance_ext.ops.partial_conv2d`.

        Raises:
            ValueError: The mask's channels do not suit ``multi_channel``, or it has a gradient.
        """
        if mask_in is not None and mask_in.requires_grad:
            raise ValueError(
                "PartialConv2d: expected a mask_in that requires no gradient, got one that does"
            )
        if mask_in is None:
            channels = self.in_channels if self.multi_channel else 1
            mask_in = torch.ones(
                (1, channels, *input.shape[-2:]), dtype=torch.bool, device=input.device
            )
        channels = mask_in.shape[1] if mask_in.dim() == 4 else 1
        if channels != (self.in_channels if self.multi_channel else 1):
            expected = self.in_channels if self.multi_channel else 1
            raise ValueError(
                f"PartialConv2d: expected mask_in to have {expected} channels "
                f"(multi_channel={self.multi_channel}), got {channels}"
            )
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, mask_in = self._pad(input), self._pad_mask(mask_in)
            padding = 0
        elif isinstance(padding, str):
            before_after = self._reversed_padding_repeated_twice
            if before_after[0] != before_after[1] or before_after[2] != before_after[3]:
                # "same" with an even window pads one side more: pad by hand, as missing.
                input = F.pad(input, before_after)
                mask_in = F.pad(mask_in, before_after)
                padding = 0
            else:
                padding = (before_after[2], before_after[0])
        output, mask_out = partial_conv2d(
            input,
            mask_in,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        if self.multi_channel:  # one input channel gave a mask of one
            mask_out = mask_out.expand(-1, self.out_channels, -1, -1)
        return (output, mask_out) if self.return_mask else output

    def _pad(self, image: Tensor) -> Tensor:
        return F.pad(image, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _pad_mask(self, mask: Tensor) -> Tensor:
        """A reflected, replicated or wrapped pixel is as valid as the one that it copies."""
        if mask.dim() < 4:
            mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
        return self._pad(mask.ne(0).float()).ne(0).to(mask.dtype)

    def extra_repr(self) -> str:
        """Conv2d's line and this layer's own settings."""
        extra = super().extra_repr()
        if self.multi_channel:
            extra += ", multi_channel=True"
        if self.return_mask:
            extra += ", return_mask=True"
        return extra


def convert_torch_pconv_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a network of ``torch_pconv.PConv2d`` layers to ``PartialConv2d``'s.

    ``x.regular_conv.weight`` becomes ``x.weight``, a ``bias`` of shape ``(1, K, 1, 1)`` becomes
    ``(K,)``, and the constant ``x.mask_conv.weight`` is left out. Other tensors pass unchanged.

    Args:
        state: The network's ``state_dict``.

    Raises:
        ValueError: A layer's mask convolution is not all ones, so it is no partial convolution.
    """
    converted: dict[str, Tensor] = {}
    layers = {
        key.removesuffix("regular_conv.weight")
        for key in state
        if key == "regular_conv.weight" or key.endswith(".regular_conv.weight")
    }
    for key, value in state.items():
        layer, _, name = key.rpartition("regular_conv.")
        if name == "weight" and layer in layers:
            converted[f"{layer}weight"] = value
            continue
        layer, _, name = key.rpartition("mask_conv.")
        if name == "weight" and layer in layers:
            if not bool((value == 1).all()):
                raise ValueError(f"convert_torch_pconv_state: expected {key} to be all ones")
            continue
        if key.endswith("bias") and key.removesuffix("bias") in layers:
            value = value.reshape(-1)
        converted[key] = value
    return converted
