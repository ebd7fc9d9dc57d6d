"""Detection in readable plain PyTorch: what the fast path is compared with, and checked against.

One masked Global-Net pass and one Local-Net pass for each patch, 64 patches at a time, and the map
by folding the scores over their patches. Nothing here calls the package's native ops or shares
work between patches; the weights are the model's own. Written as one would write it to be fast:
channels_last, no gradients, in place where that costs no clarity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance
from glance_ext.models.global_net import GlobalNet
from glance_ext.models.normalisation import normalise

BATCH = 64
LAMBDA_S = 0.8  # share of the inconsistency in a patch's score (paper, section 3.4)


def prepared(model: Glance) -> Glance:
    """A copy whose convolutions take channels_last, which is the faster layout here."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


@torch.no_grad()
def detect_maps(model: Glance, images: Tensor, starts: Sequence[int]) -> Tensor:
    """The anomaly maps of images.

    Args:
        model: From :func:`prepared`; the networks may be in another dtype than the heads.
        images: ``(N, 3, 256, 256)``, RGB in [0, 1], in the dtype that the heads compute in.
        starts: First rows of the patches, which are the first columns too; ascending.

    Returns:
        Maps ``(N, 256, 256)``.
    """
    origins = [(row, column) for row in starts for column in starts]
    x = normalise(images)
    scores = patch_scores(
        model, local_features(model, x, origins), global_features(model, x, origins)
    )
    return fold_means(scores.unflatten(1, (len(starts), len(starts))), starts)


@torch.no_grad()
def patch_scores(model: Glance, local: Tensor, global_: Tensor) -> Tensor:
    """``s = lambda_s s_IAD + (1 - lambda_s) s_DAD``.

    Args:
        model: Its distortion head is used.
        local: Local features ``(N, P, n)``.
        global_: Global features ``(N, P, n)``.

    Returns:
        Scores ``(N, P)``.
    """
    head = model.distortion_head
    local, global_ = local.to(head.hidden.weight.dtype), global_.to(head.hidden.weight.dtype)
    inconsistency = (local - global_).square().mean(-1)
    hidden = F.leaky_relu(head.hidden(torch.cat((local, global_), -1)), 0.01)
    undistorted = torch.sigmoid(head.output(hidden)).squeeze(-1)
    return LAMBDA_S * inconsistency + (1 - LAMBDA_S) * (1 - undistorted)


@torch.no_grad()
def local_features(model: Glance, images: Tensor, origins: Sequence[tuple[int, int]]) -> Tensor:
    """Local-Net on each patch alone.

    Args:
        model: Its Local-Net is used.
        images: ``(N, 3, 256, 256)``, normalised.
        origins: Row and column of each patch's first pixel.

    Returns:
        ``(N, P, n)``.
    """
    images = images.to(_dtype(model.local_net), memory_format=torch.channels_last)

    def describe(image: Tensor, chunk: Sequence[tuple[int, int]]) -> Tensor:
        patches = torch.stack([image[:, y : y + PATCH_SIZE, x : x + PATCH_SIZE] for y, x in chunk])
        return model.local_net.layers(patches).flatten(1)

    return _in_batches(describe, images, origins)


@torch.no_grad()
def global_features(model: Glance, images: Tensor, origins: Sequence[tuple[int, int]]) -> Tensor:
    """Global-Net on the image with each patch masked out.

    Args:
        model: Its Global-Net is used.
        images: ``(N, 3, 256, 256)``, normalised.
        origins: Row and column of each patch's first pixel.

    Returns:
        ``(N, P, n)``.
    """
    images = images.to(_dtype(model.global_net), memory_format=torch.channels_last)

    def describe(image: Tensor, chunk: Sequence[tuple[int, int]]) -> Tensor:
        masks = image.new_ones(len(chunk), 1, *image.shape[1:])
        for mask, (y, x) in zip(masks, chunk, strict=True):
            mask[:, y : y + PATCH_SIZE, x : x + PATCH_SIZE] = 0
        return masked_global_net(model.global_net, image[None], masks).flatten(1)

    return _in_batches(describe, images, origins)


def masked_global_net(network: GlobalNet, image: Tensor, masks: Tensor) -> Tensor:
    """Global-Net with its partial convolutions composed from torch's ops.

    Args:
        network: Whose weights to use.
        image: ``(1 or B, 3, 256, 256)``.
        masks: ``(B, 1, 256, 256)`` of the image's dtype; 0 is missing.

    Returns:
        ``(B, n, 1, 1)``.
    """
    x, mask = masked_convolution(image, masks, network.stem)
    x, mask = F.max_pool2d(F.relu(x), 3, 2), F.max_pool2d(mask, 3, 2)
    for layer in network.layers[:-1]:
        x, mask = masked_convolution(x, mask, layer)
        x = F.relu(x)
    return masked_convolution(x, mask, network.layers[-1])[0]


def masked_convolution(x: Tensor, mask: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """``conv(x * mask) * sum(1) / sum(mask) + bias`` where a window has a valid pixel, else 0.

    Args:
        x: ``(1 or B, C, H, W)``.
        mask: ``(B, 1, H, W)`` of the input's dtype.
        layer: A convolution without padding.

    Returns:
        The output ``(B, K, H', W')`` and its mask ``(B, 1, H', W')``.
    """
    assert isinstance(layer, nn.Conv2d)
    window = layer.weight.new_ones(1, 1, *layer.kernel_size)
    count = F.conv2d(mask, window, stride=layer.stride)
    valid = count.clamp(max=1)
    ratio = window.numel() / count.clamp(min=1) * valid
    output = F.conv2d(x * mask, layer.weight, stride=layer.stride)
    assert layer.bias is not None
    return output.mul_(ratio).add_(layer.bias.view(1, -1, 1, 1) * valid), valid


@torch.no_grad()
def fold_means(scores: Tensor, starts: Sequence[int]) -> Tensor:
    """The mean of the patches over each pixel: fold of the scores over fold of ones.

    ``F.fold`` knows regular grids only; a grid whose last patches stand flush with the border, or
    the paper's uneven one, is folded run by run of equal steps.

    Args:
        scores: ``(N, g, g)``.
        starts: The g first rows of the patches, which are the first columns too; ascending.

    Returns:
        ``(N, 256, 256)``.
    """
    total = scores.new_zeros(len(scores), *IMAGE_SIZE)
    count = scores.new_zeros(1, *IMAGE_SIZE)
    for rows in _regular_runs(starts):
        for columns in _regular_runs(starts):
            part = scores[:, rows[0], :][:, :, columns[0]].flatten(1)
            spread = part[:, None].expand(-1, PATCH_SIZE**2, -1)
            ones = torch.ones_like(spread[:1])
            (y, height, step_y), (x, width, step_x) = _extent(rows[1]), _extent(columns[1])
            size, stride = (height, width), (step_y, step_x)
            place = (slice(None), slice(y, y + height), slice(x, x + width))
            total[place] += F.fold(spread, size, PATCH_SIZE, stride=stride)[:, 0]
            count[place] += F.fold(ones, size, PATCH_SIZE, stride=stride)[:, 0]
    return total / count


def _regular_runs(starts: Sequence[int]) -> list[tuple[slice, Sequence[int]]]:
    """The starts cut into runs of equal steps: where each run stands, and its starts."""
    runs, first = [], 0
    while first < len(starts):
        end = first + 1
        while end < len(starts) and (
            end == first + 1 or starts[end] - starts[end - 1] == starts[first + 1] - starts[first]
        ):
            end += 1
        runs.append((slice(first, end), starts[first:end]))
        first = end
    return runs


def _extent(run: Sequence[int]) -> tuple[int, int, int]:
    """First pixel, pixels from there on, and step of a run of patches."""
    step = run[1] - run[0] if len(run) > 1 else 1
    return run[0], run[-1] - run[0] + PATCH_SIZE, step


def _in_batches(
    describe: Callable[[Tensor, Sequence[tuple[int, int]]], Tensor],
    images: Tensor,
    origins: Sequence[tuple[int, int]],
) -> Tensor:
    """``describe`` for every image and 64 origins at a time, ``(N, P, n)``."""
    return torch.stack(
        [torch.cat([describe(image, chunk) for chunk in _chunks(origins)]) for image in images]
    )


def _chunks(origins: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    for start in range(0, len(origins), BATCH):
        yield origins[start : start + BATCH]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
