"""Global-Net: the feature that a patch's surroundings predict, by partial convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.models.initialisation import initialise
from glance_ext.nn import HoleFeatures, HolePlan, MaskedMaxPool2d, PartialConv2d

# (kernel, stride, channels) of the partial convolutions behind the pooling (method, section 3.3).
_LAYERS = ((3, 2, 32), (3, 1, 32), (3, 2, 64), (3, 1, 64), (3, 2, 128), (3, 1, 128), (3, 1, None))


class GlobalNet(nn.Module):
    """Global-Net ``G``: ``Z_g = G(I, M_0)``.

    pconv7x7 stride 2 to 16 channels, ReLU, max-pool 3 stride 2, then partial convolutions 3x3 to
    32, 32, 64, 64, 128, 128 and n channels with strides 2, 1, 2, 1, 2, 1, 1 and ReLU after all but
    the last, no padding: 256-125-62-30-28-13-11-5-3-1 pixels.

    Args:
        features: n, the length of the feature.
    """

    IMAGE_SIZE = 256

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.features = features
        self.stem = PartialConv2d(3, 16, 7, stride=2, return_mask=True)
        self.pool = MaskedMaxPool2d(3, stride=2)
        layers, channels = [], 16
        for kernel, stride, out_channels in _LAYERS:
            out_channels = out_channels or features
            layers.append(
                PartialConv2d(channels, out_channels, kernel, stride=stride, return_mask=True)
            )
            channels = out_channels
        self.layers = nn.ModuleList(layers)
        initialise(self)

    def through_holes(self) -> HoleFeatures:
        """The network as a sequence of layers, for many holes at once (its weights are shared)."""
        layers: list[nn.Module] = [self.stem, nn.ReLU(), self.pool]
        for layer in self.layers:
            layers += [layer, nn.ReLU()]
        return HoleFeatures(layers[:-1])

    def plan(
        self,
        origins: Tensor,
        patch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HolePlan:
        """The geometry of holes that stand over patches, for :meth:`shared_features`.

        Args:
            origins: ``(P, 2)`` or ``(N, P, 2)``, row and column of each patch's first pixel.
            patch_size: Side in pixels.
            image_size: Height and width in pixels.
            device: Of the images to come.
            dtype: Of the images to come.
        """
        holes = self.through_holes()
        return holes.plan(image_size, patch_size, origins, device=device, dtype=dtype)

    def shared_features(self, images: Tensor, plan: HolePlan) -> Tensor:
        """``Z_g`` of every patch of every image, equal to :meth:`forward` patch by patch.

        One pass without holes and, for each hole, only the cells that it changes.

        Args:
            images: ``(N, 3, 256, 256)``, normalised.
            plan: From :meth:`plan`.

        Returns:
            Global features ``(N, P, n)``.

        Raises:
            ValueError: The images do not shrink to one feature each.
        """
        x = self.through_holes()(images, plan)
        self._check_size(x, images)
        return x.flatten(2)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Describes what the masked pixels' surroundings predict.

        Args:
            images: ``(B, 3, 256, 256)``, normalised.
            mask: ``(256, 256)``, ``(B, 256, 256)`` or ``(1 or B, 1, 256, 256)``; 0 on the patch, 1
                elsewhere.

        Returns:
            Global features ``(B, n)``.

        Raises:
            ValueError: The images do not shrink to one feature each.
        """
        x, mask = self.stem(images, mask)
        x, mask = self.pool(F.relu(x), mask)
        for layer in self.layers[:-1]:
            x, mask = layer(x, mask)
            x = F.relu(x)
        x, mask = self.layers[-1](x, mask)
        self._check_size(x, images)
        return x.flatten(1)

    def _check_size(self, x: Tensor, images: Tensor) -> None:
        if x.shape[-2:] != (1, 1):
            raise ValueError(
                f"GlobalNet: expected images of {self.IMAGE_SIZE}x{self.IMAGE_SIZE} pixels, got "
                f"{images.shape[-2]}x{images.shape[-1]}"
            )


def hole_masks(origins: Tensor, patch_size: int, image_size: tuple[int, int]) -> Tensor:
    """The masks ``M_0``: 0 on each patch, 1 elsewhere.

    Args:
        origins: ``(B, 2)`` int64, row and column of each patch's first pixel.
        patch_size: Side in pixels.
        image_size: Height and width in pixels.

    Returns:
        ``(B, 1, H, W)`` bool.
    """
    y = torch.arange(image_size[0], device=origins.device) - origins[:, :1]
    x = torch.arange(image_size[1], device=origins.device) - origins[:, 1:]
    inside = ((y >= 0) & (y < patch_size))[:, :, None] & ((x >= 0) & (x < patch_size))[:, None]
    return ~inside[:, None]
