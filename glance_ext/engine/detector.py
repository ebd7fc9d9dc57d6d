"""Detection: an image in, a score, a map and a verdict out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.data.grid import PatchGrid, patch_grid
from glance_ext.data.images import load_image, resize, resize_planes
from glance_ext.engine.calibration import Calibration, HeadScale, head_scale, image_score
from glance_ext.engine.checkpoint import load_checkpoint, load_module, prefixed, save_checkpoint
from glance_ext.engine.graph import GraphedFunction
from glance_ext.engine.precision import network_dtype, networks_in, rounding
from glance_ext.engine.settings import PATCH_SCALES, WHITEN_OVER
from glance_ext.engine.tiles import Canvas, in_batches, tiled_size, windows_of
from glance_ext.errors import CheckpointError, GlanceError
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance, HeadScores
from glance_ext.models.local_net import LocalNet
from glance_ext.ops import aggregate_patch_scores

MODEL_KIND = "model"
MODEL_FILE = "model.safetensors"
FALSE_POSITIVE_RATE = 0.05

# Images that are scored together. One keeps the cores of a CPU busy, and more only take memory.
_BATCH_SIZE = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Detection:
    """What was found in one image.

    Attributes:
        score: The image's score, as calibrated the greatest value of its map or that above the
            map's median; at the network's resolution, or of an image in tiles at the image's own.
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
        tile: Whether images are cut into overlapping windows at their own resolution instead of
            being resized to 256x256; None for as it was calibrated.
        precision: What the networks compute in: ``"float32"``, ``"bfloat16"``, ``"float64"``, or on
            a GPU ``"tf32"``. Heads, scores and maps are in float32 or wider.
        batch_size: Images, or windows of them, that are scored together; None for 1 on a CPU and
            16 on a GPU, which replays the scoring of so many, or of one, as one CUDA graph.
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
        tile: bool | None = None,
        precision: str = "float32",
        batch_size: int | None = None,
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
        if batch_size is not None and batch_size < 1:
            raise GlanceError(f"batch_size: expected at least 1, got {batch_size}")
        self.device = torch.device(device)
        self._dtype = network_dtype(precision, self.device)
        self.precision = precision
        self.batch_size = batch_size or _BATCH_SIZE.get(self.device.type, 1)
        self.tile = calibration.tile if tile is None else tile
        self.model = model.to(self.device).eval()
        self.calibration = calibration
        self.settings = settings or {}
        try:
            self.grid: PatchGrid = patch_grid(
                calibration.grid if grid is None else grid, image_size=model.view_size
            )
        except ValueError as error:
            raise GlanceError(str(error)) from error
        calibrated = calibration.threshold(false_positive_rate)
        self.threshold = calibrated if threshold is None else threshold
        self._score: Callable[[Tensor], HeadScores] | None = None

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
            patch_scale = int(metadata.get("patch_scale", 1))  # older models have none
            if patch_scale not in PATCH_SCALES:
                raise ValueError(f"patch_scale {patch_scale}")
            whiten = bool(metadata.get("whiten", False))
            whiten_over = str(metadata.get("whiten_over", "patch"))
            if whiten_over not in WHITEN_OVER:
                raise ValueError(f"whiten_over {whiten_over}")
            memory_size = int(metadata.get("memory_size", 0))
            memory_features = int(metadata.get("memory_features", 0))
            if min(memory_size, memory_features) < 0:
                raise ValueError(f"memory_size {memory_size}, memory_features {memory_features}")
            memory_context = bool(metadata.get("memory_context", False)) and memory_size > 0
            context_head = bool(metadata.get("context_head", False)) and memory_context
            context_depth = int(metadata.get("context_depth", 2))
            if context_depth not in (2, 3):
                raise ValueError(f"context_depth {context_depth}")
            calibration = Calibration.from_json(metadata["calibration"])
            settings = dict(metadata["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the model's metadata is incomplete: {error}") from error
        model = Glance(
            local_net,
            patch_scale=patch_scale,
            whiten=whiten,
            whiten_over=whiten_over,
            memory_size=memory_size,
            memory_features=memory_features,
            memory_context=memory_context,
            context_head=context_head,
            context_depth=context_depth,
        )
        load_module(model, tensors, "model", file)
        return cls(model, calibration, settings, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes model, calibration and settings to one file."""
        scale, memory = self.model.residual_scale, self.model.memory
        context_net = self.model.context_net
        metadata = {
            "kernel_size": self.model.local_net.kernel_size,
            "features": self.model.local_net.features,
            "patch_scale": self.model.patch_scale,
            "whiten": scale is not None,
            "whiten_over": "patch" if scale is None else scale.over,
            "memory_size": 0 if memory is None else len(memory),
            "memory_features": 0 if memory is None else memory.taught,
            "memory_context": context_net is not None,
            "context_head": self.model.context_head is not None,
            "context_depth": 2 if context_net is None else len(context_net.widths),
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
        return self.detect_batch([image])[0]

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[Detection]:
        """Scores some images together.

        Args:
            images: Each ``(H, W, 3)`` float32 RGB in [0, 1]; of any sizes.

        Returns:
            One detection for each image, as it alone would have but for rounding.

        Raises:
            ValueError: An array has another form.
            MemoryError: The images, or their maps, do not fit in memory.
        """
        for image in images:
            _check_image(image)
        try:
            maps = self.native_maps([self.prepare(image) for image in images])
            return [
                Detection(
                    self.image_score(found), resize_map(found, image.shape[:2]), self.threshold
                )
                for found, image in zip(maps, images, strict=True)
            ]
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise MemoryError(str(error)) from error
            raise

    def image_score(self, anomaly_map: Tensor) -> float:
        """The score of an image with this map ``(h, w)``."""
        return image_score(anomaly_map, self.calibration.image_score)

    def prepare(self, image: np.ndarray) -> Tensor:
        """An image ``(H, W, 3)`` at the size at which it is scored, ``(3, h, w)``.

        It is on the detector's device, in tiles on the CPU, since it may be larger than a GPU has
        room for.
        """
        if self.tile:
            return resize(image, tiled_size(*image.shape[:2]))
        return resize(image, IMAGE_SIZE, self.device)

    @torch.inference_mode()
    def native_maps(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Maps of prepared images, window by window; images of 256x256 are one window.

        Args:
            images: Each ``(3, h, w)``, RGB in [0, 1], at least 256x256.

        Returns:
            For each ``(h, w)`` float32; on the detector's device if all are one window, else on the
            CPU.
        """
        if all(image.shape[-2:] == IMAGE_SIZE for image in images):
            batches = in_batches(images, self.batch_size)
            return [found for some in batches for found in self._maps(torch.stack(some)).float()]
        canvases = [Canvas(image.shape[-2:]) for image in images]
        for some in in_batches(windows_of(canvases), self.batch_size):
            windows = torch.stack([canvases[i].cut(images[i], window) for i, window in some])
            for (i, window), anomaly_map in zip(some, self.score_maps(windows), strict=True):
                canvases[i].add(window, anomaly_map)
        return [canvas.map for canvas in canvases]

    @torch.inference_mode()
    def score_maps(self, images: Tensor) -> Tensor:
        """Maps at the network's resolution.

        Args:
            images: ``(N, 3, 256, 256)``, RGB in [0, 1].

        Returns:
            ``(N, 256, 256)`` float32 on the CPU; float64 in that precision.
        """
        parts = [self._maps(some).cpu() for some in images.split(self.batch_size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _maps(self, images: Tensor) -> Tensor:
        """Maps ``(N, 256, 256)`` on the detector's device of images that are scored together."""
        return self.aggregate(self.calibration.mix(self.score_patches(images)))

    @torch.inference_mode()
    def score_patches(self, images: Tensor) -> HeadScores:
        """Raw scores of the grid's patches; the grid is planned at the first call and kept.

        Args:
            images: ``(N, 3, 256, 256)``, RGB in [0, 1].

        Returns:
            Scores ``(N, P)`` on the detector's device.
        """
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        with rounding(self.precision):
            if self._score is None:
                self._score = self._planned(wide)
            return self._score(images.to(self.device, wide))

    def _planned(self, wide: torch.dtype) -> Callable[[Tensor], HeadScores]:
        networks = networks_in(self.model, self._dtype)
        starts = self.grid.starts
        plan = networks.plan(starts, starts, device=self.device, dtype=self._dtype)

        def score(images: Tensor) -> HeadScores:
            return networks.score_grid(images, plan)

        if self.device.type != "cuda":
            return score
        example = torch.zeros((self.batch_size, 3, *IMAGE_SIZE), dtype=wide, device=self.device)
        return GraphedFunction(score, example, (1, self.batch_size))

    def aggregate(self, scores: Tensor) -> Tensor:
        """Scores ``(N, P)`` of the grid's patches as maps ``(N, 256, 256)``."""
        side, scale = self.model.view_size, self.model.patch_scale
        maps = aggregate_patch_scores(
            scores,
            PATCH_SIZE,
            (side, side),
            origins=self.grid.origins,
            mode=self.calibration.aggregation,
        )
        if scale == 1:
            return maps
        maps = resize_planes(maps, (side * scale, side * scale))
        rest = IMAGE_SIZE[0] - side * scale  # what the shrinking leaves over has no patch
        return F.pad(maps[:, None], (0, rest, 0, rest), mode="replicate")[:, 0] if rest else maps


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"detect: expected an image of shape (H, W, 3), got {image.shape}")
    low, high = image.min(), image.max()
    if image.dtype.kind != "f" or not (low >= 0 and high <= 1):  # also if either is NaN
        raise ValueError(
            "detect: expected floating-point pixel values from 0 to 1, got "
            f"{image.dtype} from {low} to {high}"
        )


def resize_map(anomaly_map: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map ``(h, w)`` at another size, bilinear, as ``(H, W)`` float32."""
    return resize_planes(anomaly_map[None].float(), size)[0].cpu().numpy()


@torch.inference_mode()
def calibrate(
    model: Glance,
    images: Iterable[Tensor],
    *,
    lambda_s: float,
    standardise: bool,
    aggregation: str,
    grid: str,
    tile: bool,
    optimistic: bool,
    device: torch.device,
    image_score: str = "max",
    memory_share: float = 0.0,
    context_share: float = 0.0,
    surprisal: bool = False,
) -> Calibration:
    """Measures the heads' scales and the image scores of held-out normal images.

    Args:
        model: The trained model.
        images: Held-out normal images, each ``(3, 256, 256)``, or with ``tile`` ``(3, h, w)``; gone
            through once, so it may be an iterator that reads them or shows progress.
        lambda_s: Share of the inconsistency score.
        standardise: Whether to bring the heads to one scale.
        aggregation: How patches become a map.
        grid: Which patches are scored.
        tile: Whether images have their own resolution and are scored in windows.
        optimistic: Whether these images were trained on.
        device: Where to compute.
        image_score: What of its map an image's score is.
        memory_share: Share of the novelty in a patch's score, if the model has one.
        context_share: Share of the distortion head in context beside the other, if there is one.
        surprisal: Whether that scale is the surprisal, or else mean 0 and variance 1.
    """
    scale = HeadScale(0.0, 1.0)
    draft = Calibration(
        lambda_s=lambda_s,
        standardise=standardise,
        aggregation=aggregation,
        grid=patch_grid(grid, image_size=model.view_size).name,
        inconsistency=scale,
        log_odds=scale,
        held_out_scores=(0.0,),
        pixel_range=(0.0, 1.0),
        optimistic=optimistic,
        tile=tile,
        image_score=image_score,
        memory_share=memory_share if model.memory is not None else 0.0,
        context_share=context_share if model.context_head is not None else 0.0,
    )
    detector = Detector(model, draft, device=device)
    scored = []  # for each image its canvas and its windows' scores: scales come before maps
    for image in images:
        canvas = Canvas(image.shape[-2:])
        parts = [
            detector.score_patches(torch.stack([canvas.cut(image, window) for window in some]))
            for some in in_batches(canvas.windows, detector.batch_size)
        ]
        scored.append((canvas, parts))
    every = [part for _, parts in scored for part in parts]
    novelties = [part.novelty for part in every if part.novelty is not None]
    in_context = [part.context_log_odds for part in every if part.context_log_odds is not None]
    detector.calibration = draft = replace(
        draft,
        inconsistency=head_scale([part.inconsistency for part in every], surprisal),
        log_odds=head_scale([part.log_odds for part in every], surprisal),
        novelty=head_scale(novelties, surprisal) if novelties else None,
        context_log_odds=head_scale(in_context, surprisal) if in_context else None,
    )
    peaks, quantiles = [], []
    for canvas, parts in scored:
        maps = torch.cat([detector.aggregate(draft.mix(part)).cpu() for part in parts])
        for window, anomaly_map in zip(canvas.windows, maps, strict=True):
            canvas.add(window, anomaly_map)
        peaks.append(detector.image_score(canvas.map))
        quantiles.append(np.quantile(canvas.map.numpy(), (0.5, 0.99)))
    return replace(
        draft,
        held_out_scores=tuple(peaks),
        pixel_range=tuple(np.median(quantiles, axis=0).tolist()),
    )
