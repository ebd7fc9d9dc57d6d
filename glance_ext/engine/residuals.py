"""How much, and in which directions, the two features disagree on normal patches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.engine.tiles import Canvas
from glance_ext.models.glance import Glance


@torch.inference_mode()
def fit_residual_scale(
    model: Glance, images: Iterable[Tensor], *, grid: str, device: torch.device
) -> None:
    """Fits the model's ``residual_scale`` to normal images, over all patches of a grid.

    Over images, a window of a larger image counts as one.

    Args:
        model: With a ``residual_scale``.
        images: Normal images, each ``(3, h, w)`` of at least 256x256; larger ones in windows.
        grid: Which patches.
        device: Where to compute.
    """
    assert model.residual_scale is not None
    starts = patch_grid(grid, image_size=model.view_size).starts
    plan = model.to(device).eval().plan(starts, starts, device=device)
    features = model.local_net.features
    count = 0
    total = torch.zeros(features, dtype=torch.float64, device=device)
    products = torch.zeros((features, features), dtype=torch.float64, device=device)
    for image in images:
        canvas = Canvas(image.shape[-2:])
        for window in canvas.windows:
            local, around = model.grid_features(canvas.cut(image, window)[None].to(device), plan)
            residuals = (local - around)[0].double()
            if model.residual_scale.over == "image":
                residuals = residuals.mean(0, keepdim=True)
            count += len(residuals)
            total += residuals.sum(0)
            products += residuals.T @ residuals
    model.residual_scale.fit(count, total, products)
