"""Detection: an image in, a score, a map and a verdict out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glance_ext.data.grid import PatchGrid, patch_grid
from glance_ext.data.images import load_image, resize, resize_planes
from glance_ext.engine.calibration import Calibration, head_scale
from glance_ext.engine.checkpoint import load_checkpoint, load_module, prefixed, save_checkpoint
from glance_ext.errors import CheckpointError, GlanceError
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance
from glance_ext.models.local_net import LocalNet
from glance_ext.ops import aggregate_patch_scores

MODEL_KIND = "model"
MODEL_FILE = "model.safetensors"
FALSE_POSITIVE_RATE = 0.05


@dataclass(frozen=True)
class Detection:
    """What was found in one image.

    Attributes:
        score: The image's score: the greatest value of its map at the network's resolution.
        map: ``(H, W)`` float32 raw scores at the image's own height and width.
        threshold: The threshold in force.
    """

    score: float
    map: np.ndarray
    threshold: float

    @property
    def anomalous(self) -> bool:
        """Whether the score exceeds the threshold."""
        return self.score > self.threshold


class Detector:
    """A trained model with its calibration.

    Args:
        model: Both networks and heads.
        calibration: From held-out normal images.
        settings: The settings of training, for the record.
        device: Where to compute.
        grid: A stride or ``"paper"``; None for the one that was calibrated.
        false_positive_rate: The share of normal images that the threshold may flag.
        threshold: Overrides the calibrated one.
    """

    def __init__(
        self,
        model: Glance,
        calibration: Calibration,
        settings: dict[str, Any] | None = None,
        *,
        device: torch.device | str = "cpu",
        grid: str | None = None,
        false_positive_rate: float = FALSE_POSITIVE_RATE,
        threshold: float | None = None,
    ) -> None:
        if threshold is not None and not math.isfinite(threshold):
            raise GlanceError(f"threshold: expected a finite number, got {threshold}")
        if not 0 <= false_positive_rate < 1:
            raise GlanceError(
                "false_positive_rate: expected a share of at least 0 and below 1, got "
                f"{false_positive_rate}"
            )
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.calibration = calibration
        self.settings = settings or {}
        try:
            self.grid: PatchGrid = patch_grid(calibration.grid if grid is None else grid)
        except ValueError as error:
            raise GlanceError(str(error)) from error
        self._calibrated_threshold = calibration.threshold(false_positive_rate)
        self.threshold = self._calibrated_threshold if threshold is None else threshold

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Detector:
        """Reads a model that training wrote.

        Args:
            path: The folder that ``train --output`` named, or the file in it.
            **options: See :class:`Detector`.

        Raises:
            CheckpointError: The file cannot be used; the message says why.
        """
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        tensors, metadata = load_checkpoint(file, MODEL_KIND)
        try:
            local_net = LocalNet(int(metadata["kernel_size"]), int(metadata["features"]))
            calibration = Calibration.from_json(metadata["calibration"])
            settings = dict(metadata["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the model's metadata is incomplete: {error}") from error
        model = Glance(local_net)
        load_module(model, tensors, "model", file)
        return cls(model, calibration, settings, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes model, calibration and settings to one file."""
        metadata = {
            "kernel_size": self.model.local_net.kernel_size,
            "features": self.model.local_net.features,
            "calibration": self.calibration.to_json(),
            "settings": self.settings,
        }
        save_checkpoint(path, MODEL_KIND, prefixed(self.model, "model"), metadata)

    def detect(self, image: np.ndarray | str | os.PathLike[str]) -> Detection:
        """Scores one image.

        Args:
            image: A file, or ``(H, W, 3)`` float32 RGB in [0, 1]; any size and aspect ratio.

        Raises:
            InputError: The file cannot be used.
            ValueError: The array has another form.
            MemoryError: The image, or its map, does not fit in memory.
        """
        if not isinstance(image, np.ndarray):
            image = load_image(image)
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"detect: expected an image of shape (H, W, 3), got {image.shape}")
        low, high = image.min(), image.max()
        if image.dtype.kind != "f" or not (low >= 0 and high <= 1):  # also if either is NaN
            raise ValueError(
                "detect: expected floating-point pixel values from 0 to 1, got "
                f"{image.dtype} from {low} to {high}"
            )
        try:
            anomaly_map = self.score_maps(resize(image, IMAGE_SIZE)[None])[0]
            full = resize_map(anomaly_map, (image.shape[0], image.shape[1]))
        except RuntimeError as error:  # how torch says it on a CPU
            if "can't allocate memory" in str(error):
                raise MemoryError(str(error)) from error
            raise
        return Detection(float(anomaly_map.max()), full, self.threshold)

    @torch.inference_mode()
    def score_maps(self, images: Tensor) -> Tensor:
        """Maps at the network's resolution.

        Args:
            images: ``(N, 3, 256, 256)``, RGB in [0, 1].

        Returns:
            ``(N, 256, 256)`` float32 on the CPU.
        """
        origins = self.grid.origins
        scores = self.model.score_patches(images.to(self.device, torch.float32), origins)
        return self.aggregate(self.calibration.mix(scores), origins).cpu()

    def aggregate(self, scores: Tensor, origins: Tensor) -> Tensor:
        """Patch scores ``(N, P)`` as maps ``(N, 256, 256)``."""
        return aggregate_patch_scores(
            scores, PATCH_SIZE, IMAGE_SIZE, origins=origins, mode=self.calibration.aggregation
        )


def resize_map(anomaly_map: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map ``(h, w)`` at another size, bilinear, as ``(H, W)`` float32."""
    return resize_planes(anomaly_map[None].float(), size)[0].numpy()


@torch.inference_mode()
def calibrate(
    model: Glance,
    images: Sequence[Tensor],
    *,
    lambda_s: float,
    standardise: bool,
    aggregation: str,
    grid: str,
    optimistic: bool,
    device: torch.device,
) -> Calibration:
    """Measures the heads' scales and the image scores of held-out normal images.

    Args:
        model: The trained model.
        images: Held-out normal images, each ``(3, 256, 256)``; may be an iterator that shows
            progress.
        lambda_s: Share of the inconsistency score.
        standardise: Whether to standardise the heads.
        aggregation: How patches become a map.
        grid: Which patches are scored.
        optimistic: Whether these images were trained on.
        device: Where to compute.
    """
    model = model.to(device).eval()
    origins = patch_grid(grid).origins
    scores = [model.score_patches(image[None].to(device).float(), origins) for image in images]
    draft = Calibration(
        lambda_s=lambda_s,
        standardise=standardise,
        aggregation=aggregation,
        grid=patch_grid(grid).name,
        inconsistency=head_scale([score.inconsistency for score in scores]),
        log_odds=head_scale([score.log_odds for score in scores]),
        held_out_scores=(0.0,),
        pixel_range=(0.0, 1.0),
        optimistic=optimistic,
    )
    detector = Detector(model, draft, device=device)
    maps = torch.cat([detector.aggregate(draft.mix(score), origins).cpu() for score in scores])
    quantiles = np.quantile(maps.flatten(1).numpy(), (0.5, 0.99), axis=1)
    return Calibration(
        **{
            **vars(draft),
            "held_out_scores": tuple(maps.flatten(1).amax(1).double().tolist()),
            "pixel_range": tuple(np.median(quantiles, axis=1).tolist()),
        }
    )
