"""Partial forms of ``nn.Conv1d``, ``nn.Conv3d`` and ``nn.ConvTranspose2d``."""

from __future__ import annotations

from torch import Tensor, nn

from glance_ext.nn.partial_conv import PartialConvNd, _PartialConvolution
from glance_ext.ops import partial_conv1d, partial_conv3d, partial_conv_transpose2d


class PartialConv1d(PartialConvNd, nn.Conv1d):  # type: ignore[misc]
    """``nn.Conv1d`` for signals and series with gaps; has its arguments and ``state_dict``.

    Args:
        *args: ``nn.Conv1d``'s.
        multi_channel: Whether the mask has one channel for each input channel.
        return_mask: Whether to return the next layer's mask too.
        **kwargs: ``nn.Conv1d``'s.
    """

    _sides = 1
    _op = staticmethod(partial_conv1d)


class PartialConv3d(PartialConvNd, nn.Conv3d):  # type: ignore[misc]
    """``nn.Conv3d`` for volumes with gaps; has its arguments and ``state_dict``.

    Args:
        *args: ``nn.Conv3d``'s.
        multi_channel: Whether the mask has one channel for each input channel.
        return_mask: Whether to return the next layer's mask too.
        **kwargs: ``nn.Conv3d``'s.
    """

    _sides = 3
    _op = staticmethod(partial_conv3d)


class PartialConvTranspose2d(_PartialConvolution, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` of what is valid; has its arguments and ``state_dict``.

    Args:
        *args: ``nn.ConvTranspose2d``'s.
        multi_channel: Whether the mask has one channel for each input channel.
        return_mask: Whether to return the next layer's mask too.
        **kwargs: ``nn.ConvTranspose2d``'s.
    """

    _sides = 2

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        mask_in: Tensor | None = None,
        output_size: list[int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Upsamples the valid part of ``input``.

        Args:
            input: ``(N, C, H, W)``.
            mask_in: 1 = valid; ``(1 or N, C, H, W)`` for a multi-channel layer, else ``(H, W)``,
                ``(N, H, W)`` or ``(1 or N, 1, H, W)``. None means that all pixels are valid.
            output_size: The output's height and width, of those that ``stride`` leaves open; None
                for that of ``output_padding``.

        Returns:
            The output ``(N, K, Ho, Wo)``, and with ``return_mask`` the next mask, see
            :func:`glance_ext.ops.partial_conv_transpose2d`.

        Raises:
            ValueError: The mask's channels do not suit ``multi_channel``, it has a gradient, or
                there is no such output.
        """
        mask = self._checked_mask(input, mask_in)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return self._returned(
            *partial_conv_transpose2d(
                input,
                mask,
                self.weight,
                self.bias,
                self.stride,
                self.padding,  # type: ignore[arg-type]
                output_padding,
                self.groups,
                self.dilation,
            )
        )
