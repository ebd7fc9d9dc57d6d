"""``PartialConv2d``: in place of ``nn.Conv2d`` and of NVIDIA's layer of that name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.ops import partial_conv2d, soft_partial_conv2d


class _PartialConvolution(nn.Module):
    """What the partial forms of torch's convolution modules share: the mask's way through them."""

    in_channels: int
    out_channels: int
    _sides: ClassVar[int]

    def __init__(
        self, *args: Any, multi_channel: bool = False, return_mask: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.multi_channel = multi_channel
        self.return_mask = return_mask

    def _checked_mask(self, input: Tensor, mask_in: Tensor | None) -> Tensor:
        """The mask, all ones if there is none, with the channels that the layer is made for."""
        expected = self.in_channels if self.multi_channel else 1
        if mask_in is None:
            size = input.shape[-self._sides :]
            return torch.ones((1, expected, *size), dtype=torch.bool, device=input.device)
        if mask_in.requires_grad:
            raise ValueError(
                f"{self._get_name()}: expected a mask_in that requires no gradient, got one that "
                "does"
            )
        channels = mask_in.shape[1] if mask_in.dim() == self._sides + 2 else 1
        if channels != expected:
            raise ValueError(
                f"{self._get_name()}: expected mask_in to have {expected} channels "
                f"(multi_channel={self.multi_channel}), got {channels}"
            )
        return mask_in

    def _returned(self, output: Tensor, mask_out: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.return_mask:
            return output
        if self.multi_channel:  # one input channel gave a mask of one
            mask_out = mask_out.expand(-1, self.out_channels, *[-1] * self._sides)
        return output, mask_out

    def extra_repr(self) -> str:
        """The line of torch's module and this layer's own settings."""
        extra = super().extra_repr()
        for name in ("multi_channel", "return_mask", "soft_mask"):
            if getattr(self, name, False):
                extra += f", {name}=True"
        return extra


class PartialConvNd(_PartialConvolution, nn.modules.conv._ConvNd):
    """The forward pass of ``PartialConv1d``, ``PartialConv2d`` and ``PartialConv3d``."""

    _op: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    soft_mask: bool = False

    def forward(
        self, input: Tensor, mask_in: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolves the valid part of ``input``.

        Args:
            input: ``(N, C, *size)``; ``size`` is (L,), (H, W) or (D, H, W).
            mask_in: 1 = valid; ``(1 or N, C, *size)`` for a multi-channel layer, else ``size``,
                ``(N, *size)`` or ``(1 or N, 1, *size)``. None means that all of the input is valid;
                only padding is missing then.

        Returns:
            The output ``(N, K, *out)``, and with ``return_mask`` the next mask, see
            :func:`glance_ext.ops.partial_conv2d`.

        Raises:
            ValueError: The mask's channels do not suit ``multi_channel``, or it has a gradient.
        """
        mask = self._checked_mask(input, mask_in)
        padding: Any = self.padding
        sides = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            input, mask = self._pad(input), self._pad_mask(mask)
            padding = 0
        elif isinstance(padding, str):
            if sides[::2] != sides[1::2]:
                # "same" with an even window pads one side more: pad by hand, as missing.
                input, mask = F.pad(input, sides), F.pad(mask, sides)
                padding = 0
            else:
                padding = tuple(sides[::-2])
        # For a mask of ones and zeros the two rules are one.
        soft = self.soft_mask and mask.dtype != torch.bool
        op = soft_partial_conv2d if soft else type(self)._op
        return self._returned(
            *op(
                input,
                mask,
                self.weight,
                self.bias,
                self.stride,
                padding,
                self.dilation,
                self.groups,
            )
        )

    def _pad(self, image: Tensor) -> Tensor:
        return F.pad(image, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _pad_mask(self, mask: Tensor) -> Tensor:
        """A reflected, replicated or wrapped pixel is as valid as the one that it copies."""
        if mask.dim() < self._sides + 2:
            mask = mask[None, None] if mask.dim() == self._sides else mask[:, None]
        if self.soft_mask:
            wide = torch.float64 if mask.dtype == torch.float64 else torch.float32
            return self._pad(mask.to(wide)).to(mask.dtype)
        return self._pad(mask.ne(0).float()).ne(0).to(mask.dtype)


class PartialConv2d(PartialConvNd, nn.Conv2d):  # type: ignore[misc]
    """A partial convolution layer (Liu et al., ECCV 2018; Wang et al., CVPR 2021, section 3.3).

    Takes ``nn.Conv2d``'s arguments and has its ``state_dict``, so weights of ``nn.Conv2d`` and of
    NVIDIA's ``PartialConv2d`` load as they are. Keeps nothing from one call to the next. What
    differs from NVIDIA's layer, and why, is in docs/ops.md.

    Args:
        *args: ``nn.Conv2d``'s.
        multi_channel: Whether the mask has one channel for each input channel.
        return_mask: Whether to return the next layer's mask too.
        soft_mask: Whether the mask's values weigh the pixels from 0 to 1, by NVIDIA's rule
            (:func:`glance_ext.ops.soft_partial_conv2d`); else each nonzero value means valid.
        **kwargs: ``nn.Conv2d``'s.
    """

    _sides = 2
    _op = staticmethod(partial_conv2d)

    def __init__(self, *args: Any, soft_mask: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.soft_mask = soft_mask


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
