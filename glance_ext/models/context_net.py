"""What the first layers of a pretrained network see at a patch, its surroundings included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CENTRE = 16  # of a patch of 33x33, in pixels from its first one


class _Block(nn.Module):
    """A basic block of ResNet, batch norm folded into its convolutions."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ContextNet(nn.Module):
    """ResNet-18 up to ``layer3`` (He et al., CVPR 2016), frozen.

    It sees the whole image, so a patch's feature speaks of the patch and of what lies around it: a
    cell of ``layer1`` sees 43 pixels, one of ``layer2`` 99 and one of ``layer3`` 211, those in the
    middle most. Each map is averaged over 3x3 cells, so that a feature is of a place and not of a
    pixel, and read at the patch's centre, between cells bilinearly. Not in the paper.

    The memory compares ``layer1`` and ``layer2``; the distortion head in context reads all three.

    Args:
        depth: How many of the layers it has, 1 to 3.
    """

    LAYERS = (64, 128, 256)
    STRIDES = (4, 8, 16)

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.widths, self.strides = self.LAYERS[:depth], self.STRIDES[:depth]
        self.stem = nn.Conv2d(3, 64, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for index, width in enumerate(self.widths):
            first = _Block(channels, width, 1 if index == 0 else 2)
            self.add_module(f"layer{index + 1}", nn.Sequential(first, _Block(width, width, 1)))
            channels = width
        self.requires_grad_(False)

    @property
    def features(self) -> int:
        """Length of a patch's feature, the layers' one behind the other."""
        return sum(self.widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of all layers.

        Args:
            images: ``(N, 3, H, W)``, normalised.

        Returns:
            ``(N, 64, h, w)`` of stride 4, ``(N, 128, h', w')`` of stride 8 and ``(N, 256, h'',
            w'')`` of stride 16, their first cells at the images' first pixels; ``h`` is ``H / 4``
            rounded up.
        """
        cells = self.pool(F.relu(self.stem(images)))
        maps = []
        for index in range(len(self.widths)):
            cells = self.get_submodule(f"layer{index + 1}")(cells)
            maps.append(cells)
        return maps

    def patch_features(self, images: Tensor, origins: Tensor) -> Tensor:
        """Describes patches of 33x33 pixels of each image.

        Args:
            images: ``(N, 3, H, W)``, normalised.
            origins: ``(P, 2)`` row and column of each patch's first pixel, in every image, or
                ``(N, P, 2)``.

        Returns:
            ``(N, P, features)`` float32, or float64 of such images.
        """
        if images.is_cpu:
            images = images.contiguous(memory_format=torch.channels_last)
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        centres = (origins + _CENTRE).to(images.device, wide).expand(len(images), -1, -1)
        features = [
            _at(F.avg_pool2d(cells.to(wide), 3, 1, 1, count_include_pad=False), centres / stride)
            for cells, stride in zip(self(images), self.strides, strict=True)
        ]
        return torch.cat(features, -1)


def _at(cells: Tensor, places: Tensor) -> Tensor:
    """``(N, P, C)``: what a map ``(N, C, h, w)`` has at places ``(N, P, 2)`` between its cells."""
    last_row, last_column = (max(1, side - 1) for side in cells.shape[-2:])
    rows, columns = places.unbind(-1)
    unit = torch.stack((columns / last_column, rows / last_row), -1) * 2 - 1
    found = F.grid_sample(cells, unit[:, :, None], padding_mode="border", align_corners=True)
    return found[..., 0].transpose(1, 2)
