"""One-class CIFAR-10 (the paper's Table 3): learn one class, tell it from the other nine."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from glance_ext.data.cifar import CLASSES, Cifar10
from glance_ext.data.grid import PatchGrid
from glance_ext.data.patches import Enlarged, fingerprint
from glance_ext.engine.detector import Detector
from glance_ext.engine.reproduce import Figures, OnError, Plan, Progress, trained
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.train import NormalImages, train_loaded
from glance_ext.metrics import auroc
from glance_ext.models.glance import IMAGE_SIZE

SETTING = {"patch_scale": 6, "grid": "9", "image_score": "mean", "whiten_over": "image"}
"""On an image enlarged from 32x32 to 256x256: four patches of three quarters of its side. What does
not belong is the whole image, not a spot: its score is the mean of its map, where the inconsistency
is that of all its patches together."""

SCHEDULE = {
    "local_net": "deep",
    "steps": 200,
    "batch_size": 16,
    "holes_per_image": 4,
    "turns": False,
    "stain_uses": 1,
    "distortion": "turn",
    "head_steps": 500,
    "held_out_most": 500,
    "lambda_s": 0.5,
    "surprisal": False,
    "memory_size": 0,
    "aggregation": "mean",
}
"""Of the default preset, for a few minutes a class on one core of a CPU."""

_BATCH = 8
_KEPT_BYTES = 1 << 30


class OneClass:
    """Runs classes of CIFAR-10, and keeps the test images between them.

    Args:
        data: The data set.
        on_error: Called for each image that cannot be used.
    """

    def __init__(self, data: Cifar10, on_error: OnError) -> None:
        self._data = data
        self._on_error = on_error
        self._test: tuple[Tensor, Tensor] | None = None
        self._identity: tuple[str, PatchGrid, int] | None = None
        self._local: dict[int, Tensor] = {}

    def run(
        self, plan: Plan, name: str, progress: Progress[Tensor] = lambda items: items
    ) -> Figures:
        """Trains on one class and scores all test images.

        Args:
            plan: What is done for each class.
            name: The normal class.
            progress: Shows progress over the batches of test images.

        Returns:
            The image AUROC with the other classes as anomalies, and with each of them alone.
        """
        detector, seconds = trained(
            plan,
            plan.output / name,
            lambda resume: train_loaded(
                normal_images(self._data.load("train", name, self._on_error), plan.settings),
                plan.settings,
                output=plan.output / name,
                local_net=plan.local_net,
                teacher_weights=plan.teacher_weights,
                device=plan.device,
                resume=resume,
            ),
        )
        images, labels = self._test_images()
        start = time.perf_counter()
        found = scores(detector, images, progress, self._known(detector)).numpy()
        normal = (labels == CLASSES.index(name)).numpy()
        each = {}
        for label, other in enumerate(CLASSES):
            pair = normal | (labels == label).numpy()
            if other != name:
                each[other] = auroc(found[pair], ~normal[pair])
        return {
            "metrics": {"image_AUROC": auroc(found, ~normal)},
            "per_class": each,
            "images": len(images),
            "seconds": {"train": seconds, "evaluate": round(time.perf_counter() - start, 1)},
        }

    def _test_images(self) -> tuple[Tensor, Tensor]:
        if self._test is None:
            parts = [self._data.load("test", name, self._on_error) for name in CLASSES]
            labels = np.repeat(np.arange(len(CLASSES)), [len(part) for part in parts])
            self._test = torch.cat(parts), torch.from_numpy(labels)
        return self._test

    def _known(self, detector: Detector) -> dict[int, Tensor] | None:
        """Local-Net's features of the test images: of all classes if it is not fine-tuned."""
        model, (images, _) = detector.model, self._test_images()
        if len(images) * len(detector.grid) * model.local_net.features * 4 > _KEPT_BYTES:
            return None
        weights = [p.detach().cpu() for p in model.local_net.parameters()]
        identity = (fingerprint(weights), detector.grid, model.patch_scale)
        if identity != self._identity:
            self._identity, self._local = identity, {}
        return self._local


@torch.inference_mode()
def scores(
    detector: Detector,
    images: Tensor,
    progress: Progress[Tensor] = lambda items: items,
    known: dict[int, Tensor] | None = None,
) -> Tensor:
    """Scores small images.

    Args:
        detector: Of enlarged images.
        images: ``(N, 3, 32, 32)`` uint8.
        progress: Shows progress over batches.
        known: Local-Net's features of these images, batch by batch; what is missing is added.

    Returns:
        One score an image, ``(N,)`` float64.
    """
    model, starts = detector.model, detector.grid.starts
    plan = model.plan(starts, starts, device=detector.device)
    found = []
    for i, small in enumerate(progress(images.split(_BATCH))):
        whole = Enlarged(small, IMAGE_SIZE)[:].to(detector.device)
        local, around = model.grid_features(whole, plan, None if known is None else known.get(i))
        if known is not None:
            known[i] = local
        context = model.context_features(whole, plan.origins)
        mixed = detector.calibration.mix(model.compare(local, around, context))
        found += [detector.image_score(one) for one in detector.aggregate(mixed).double()]
    return torch.tensor(found, dtype=torch.float64)


def normal_images(images: Tensor, settings: TrainSettings) -> NormalImages:
    """A class's training images ``(N, 3, 32, 32)`` uint8, some held out to calibrate on."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    share = round(settings.held_out_share * len(images))
    count = min(max(1, share), settings.held_out_most, len(images) - 1)
    held_out = Enlarged(images[order[:count].sort().values], IMAGE_SIZE)
    rest = Enlarged(images[order[count:].sort().values], IMAGE_SIZE)
    return NormalImages(rest, len(rest), held_out, fingerprint(rest.small))
