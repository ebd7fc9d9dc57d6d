"""The suites by name: each yields its cases, one at a time, so that one case's tensors are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from glance_ext.bench import detect as detection
from glance_ext.bench import partial_conv, partial_conv_networks, patch_scores
from glance_ext.bench import train as training
from glance_ext.bench.cases import Case

# (dtype, device, seed, quick) -> cases
Suite = Callable[[torch.dtype, torch.device, int, bool], Iterator[Case]]


def ops(dtype: torch.dtype, device: torch.device, seed: int, quick: bool) -> Iterator[Case]:
    """The ops alone."""
    yield from partial_conv.cases(dtype, device, seed, quick)
    yield from patch_scores.cases(dtype, device, seed, quick)


def detect(dtype: torch.dtype, device: torch.device, seed: int, quick: bool) -> Iterator[Case]:
    """From images to maps."""
    yield from detection.cases(dtype, device, seed, quick)


def partial_conv_suite(
    dtype: torch.dtype, device: torch.device, seed: int, quick: bool
) -> Iterator[Case]:
    """``partial_conv2d`` in the layers of whole networks."""
    yield from partial_conv_networks.cases(dtype, device, seed, quick)


def train(dtype: torch.dtype, device: torch.device, seed: int, quick: bool) -> Iterator[Case]:
    """Steps of joint training."""
    yield from training.cases(dtype, device, seed, quick)


SUITES: dict[str, Suite] = {
    "detect": detect,
    "ops": ops,
    "partial-conv": partial_conv_suite,
    "train": train,
}
