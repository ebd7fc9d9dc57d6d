"""Max-pooling of features with their mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Size = int | Sequence[int]


def masked_max_pool2d(
    input: Tensor,
    mask: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pools features as usual, and the mask by "any valid in the window" (method, section 3.3).

    Args:
        input: ``(N, C, H, W)``. After a partial convolution, invalid pixels hold 0.
        mask: ``(H, W)``, ``(N, H, W)`` or ``(1 or N, 1 or C, H, W)``; bool, uint8 or float.
        kernel_size: As ``F.max_pool2d``.
        stride: As ``F.max_pool2d``.
        padding: As ``F.max_pool2d``; missing in the mask.
        dilation: As ``F.max_pool2d``.
        ceil_mode: As ``F.max_pool2d``.

    Returns:
        Features ``(N, C, Ho, Wo)`` and the mask ``(1 or N, 1 or C, Ho, Wo)`` of ``mask``'s dtype.

    Raises:
        ValueError: The mask has another height or width than the input.
    """
    if mask.shape[-2:] != input.shape[-2:]:
        raise ValueError(
            f"masked_max_pool2d: expected mask to be {input.shape[-2]}x{input.shape[-1]} like the "
            f"input, got {mask.shape[-2]}x{mask.shape[-1]}"
        )
    stride = kernel_size if stride is None else stride
    pooled = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)  # type: ignore[arg-type]
    if mask.dim() < 4:
        mask = mask.reshape(mask.shape[0] if mask.dim() == 3 else 1, 1, *mask.shape[-2:])
    valid = mask.ne(0).to(input.dtype)
    valid = F.max_pool2d(valid, kernel_size, stride, padding, dilation, ceil_mode)  # type: ignore[arg-type]
    return pooled, valid.gt(0).to(mask.dtype)  # -inf where a dilated window meets no pixel at all


class MaskedMaxPool2d(nn.Module):
    """``nn.MaxPool2d`` for features with a mask; see :func:`masked_max_pool2d`."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pools ``(N, C, H, W)`` features and their mask."""
        return masked_max_pool2d(
            input, mask, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )

    def extra_repr(self) -> str:
        """``nn.MaxPool2d``'s line."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )
