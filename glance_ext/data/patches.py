"""Images in memory, and random patches from them, for training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.data.images import load_image, resize, resize_planes
from glance_ext.errors import InputError

# A cached pixel is a float16: eleven bits, finer than 8-bit input, half the memory of float32.
_CACHE_DTYPE = torch.float16


def load_training_images(
    paths: Sequence[Path],
    size: tuple[int, int],
    *,
    on_error: Callable[[InputError], None],
) -> Tensor:
    """Loads images at the network's resolution into one tensor.

    Args:
        paths: The files.
        size: Height and width in pixels.
        on_error: Called for each file that cannot be used; the others are loaded.

    Returns:
        ``(N, 3, h, w)`` float16, RGB in [0, 1], in the order of ``paths``.
    """
    images = []
    for path in paths:
        try:
            images.append(resize(load_image(path), size).to(_CACHE_DTYPE))
        except InputError as error:
            on_error(error)
    if not images:
        return torch.empty((0, 3, *size), dtype=_CACHE_DTYPE)
    return torch.stack(images)


def load_mixed_images(
    paths: Sequence[Path], *, longest_side: int, on_error: Callable[[InputError], None]
) -> list[Tensor]:
    """Loads images of any sizes, each ``(3, h, w)`` float16, shrunk to ``longest_side`` pixels."""
    images = []
    for path in paths:
        try:
            image = load_image(path)
        except InputError as error:
            on_error(error)
            continue
        height, width = image.shape[:2]
        scale = min(1.0, longest_side / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        images.append(resize(image, size).to(_CACHE_DTYPE))
    return images


class Enlarged:
    """Small images, each enlarged when it is asked for: all at once would not fit in memory.

    Args:
        small: ``(N, 3, h, w)`` uint8.
        size: Height and width to reach, in pixels.
    """

    def __init__(self, small: Tensor, size: tuple[int, int]) -> None:
        self.small = small
        self.shape = torch.Size((len(small), 3, *size))

    def __len__(self) -> int:
        return len(self.small)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """As of a tensor ``(N, 3, H, W)`` float32, RGB in [0, 1]."""
        some = self.small[index].float() / 255
        planes = some.reshape(-1, *some.shape[-2:])
        resized = resize_planes(planes, (self.shape[-2], self.shape[-1]))
        return resized.reshape(*some.shape[:-2], *self.shape[-2:]).clamp_(0, 1)


class Turned:
    """Images turned by quarters and mirrored: each in eight views, made when it is asked for.

    The first N are every image once, in a view that changes from one to the next; the next N show
    each in another view, and so on. So any number of them from the first on is varied.

    Args:
        images: ``(N, 3, S, S)``, RGB in [0, 1].
    """

    VIEWS = 8

    def __init__(self, images: Tensor | Enlarged) -> None:
        self.images = images
        self.shape = torch.Size((self.VIEWS * len(images), *images.shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """As of a tensor ``(8 N, 3, S, S)``."""
        if isinstance(index, int):
            if not 0 <= index < len(self):
                raise IndexError(f"Turned: expected an index below {len(self)}, got {index}")
            turn, image = divmod(index, len(self.images))
            view = (turn + image) % self.VIEWS
            turned = self.images[image].rot90(view % 4, (-2, -1))
            return turned.flip(-1) if view >= 4 else turned
        return torch.stack([self[i] for i in torch.arange(len(self))[index].tolist()])


Images: TypeAlias = Tensor | Enlarged | Turned
"""``(N, 3, H, W)`` float, RGB in [0, 1], in memory or made when they are asked for."""


def fingerprint(images: Iterable[Tensor]) -> str:
    """Says how many images there are and tells them from any others, by every pixel."""
    digest, count = hashlib.sha256(), 0
    for image in images:
        digest.update(str(tuple(image.shape)).encode())
        digest.update(image.contiguous().numpy().data)
        count += 1
    return f"{count} (sha256 {digest.hexdigest()[:16]})"


def sample_positions(
    count: int, image_size: tuple[int, int], patch_size: int, generator: torch.Generator
) -> Tensor:
    """Draws uniform patch origins ``(count, 2)`` int64 in row, column order."""
    rows = torch.randint(image_size[0] - patch_size + 1, (count,), generator=generator)
    columns = torch.randint(image_size[1] - patch_size + 1, (count,), generator=generator)
    return torch.stack((rows, columns), 1)


def crop_patches(images: Tensor, origins: Tensor, patch_size: int) -> Tensor:
    """Cuts one patch out of each image.

    Args:
        images: ``(B, C, H, W)``.
        origins: ``(B, 2)`` int64, row and column of each patch's first pixel.
        patch_size: Side in pixels.

    Returns:
        ``(B, C, patch_size, patch_size)``.
    """
    owners = torch.arange(images.shape[0], device=images.device)
    return crop_from(images, owners, origins, patch_size)


def crop_from(images: Tensor, owners: Tensor, origins: Tensor, patch_size: int) -> Tensor:
    """Cuts patches out of some images, any number out of each.

    Args:
        images: ``(N, C, H, W)``.
        owners: ``(B,)`` int64, the image of each patch.
        origins: ``(B, 2)`` int64, row and column of each patch's first pixel.
        patch_size: Side in pixels.

    Returns:
        ``(B, C, patch_size, patch_size)``.
    """
    offsets = torch.arange(patch_size, device=images.device)
    rows = (origins[:, 0, None] + offsets)[:, :, None]
    columns = (origins[:, 1, None] + offsets)[:, None, :]
    return images[owners[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def sample_scaled_patches(
    images: Sequence[Tensor],
    count: int,
    patch_size: int,
    generator: torch.Generator,
    *,
    smallest_side: int = 24,
    largest_side: int = 132,
) -> Tensor:
    """Draws square crops of random scale, position and mirroring from images of any sizes.

    The side is log-uniform between ``smallest_side`` and ``largest_side``, both limited to the
    image's shorter side; a crop is resized to ``patch_size`` with antialiasing.

    Returns:
        ``(count, 3, patch_size, patch_size)`` float32 in [0, 1].
    """
    picks = torch.randint(len(images), (count,), generator=generator).tolist()
    uniform = torch.rand((count, 4), generator=generator, dtype=torch.float64).tolist()
    patches = []
    for pick, (u_side, u_row, u_column, u_flip) in zip(picks, uniform, strict=True):
        image = images[pick]
        height, width = image.shape[-2:]
        low, high = (min(side, height, width) for side in (smallest_side, largest_side))
        side = round(math.exp(math.log(low) + u_side * (math.log(high) - math.log(low))))
        row, column = int(u_row * (height - side + 1)), int(u_column * (width - side + 1))
        crop = image[None, :, row : row + side, column : column + side].float()
        if side != patch_size:
            crop = F.interpolate(
                crop, (patch_size, patch_size), mode="bilinear", antialias=True, align_corners=False
            )
        patches.append(crop.flip(-1) if u_flip < 0.5 else crop)
    return torch.cat(patches).clamp_(0, 1)


def varied(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Crops turned by quarters; half of them in other light, a third of them with grain.

    What a network learns on them holds for parts that lie otherwise, and for poor light.

    Args:
        crops: ``(B, 3, S, S)`` in [0, 1].
        generator: A CPU generator.

    Returns:
        The same shape, in [0, 1].
    """
    count, side = len(crops), crops.shape[-1]
    quarters = torch.randint(4, (count,), generator=generator).tolist()
    turned = [crop.rot90(k, (-2, -1)) for crop, k in zip(crops, quarters, strict=True)]
    lit, gain, shift, grainy, strength = torch.rand(5, count, 1, 1, 1, generator=generator)
    grain = torch.randn(count, 1, side, side, generator=generator)
    lit = lit < 0.5
    result = torch.stack(turned)
    result = result * torch.where(lit, 0.3 + gain, 1) + torch.where(lit, 0.2 * shift - 0.1, 0)
    result = result + torch.where(grainy < 0.3, 0.05 * strength, 0) * grain
    return result.clamp_(0, 1)
