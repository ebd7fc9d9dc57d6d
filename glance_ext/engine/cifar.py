"""One-class CIFAR-10 (the paper's Table 3): learn one class, tell it from the other nine."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from glance_ext.data.cifar import CLASSES, Cifar10
from glance_ext.data.patches import Enlarged, fingerprint
from glance_ext.engine.detector import Detector
from glance_ext.engine.reproduce import Figures, OnError, Plan, Progress, trained
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.train import NormalImages, train_loaded
from glance_ext.metrics import auroc
from glance_ext.models.glance import IMAGE_SIZE

SETTING = {"patch_scale": 4, "grid": "8", "image_score": "mean"}
"""On an image enlarged from 32x32 to 256x256: 25 patches of half its side, and as its score the
mean of its map, since what does not belong is the whole image, not a spot."""

_BATCH = 50


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
                _normal(self._data.load("train", name, self._on_error), plan.settings),
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
        scores = torch.cat(
            [self._scores(detector, some) for some in progress(images.split(_BATCH))]
        ).numpy()
        normal = (labels == CLASSES.index(name)).numpy()
        each = {}
        for label, other in enumerate(CLASSES):
            pair = normal | (labels == label).numpy()
            if other != name:
                each[other] = auroc(scores[pair], ~normal[pair])
        return {
            "metrics": {"image_AUROC": auroc(scores, ~normal)},
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

    def _scores(self, detector: Detector, small: Tensor) -> Tensor:
        """One score an image, ``(N,)`` float64."""
        maps = detector.score_maps(Enlarged(small, IMAGE_SIZE)[:])
        return torch.tensor([detector.image_score(one) for one in maps.double()])


def _normal(images: Tensor, settings: TrainSettings) -> NormalImages:
    """A class's training images, some of which are held out to calibrate on."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    share = round(settings.held_out_share * len(images))
    count = min(max(1, share), settings.held_out_most, len(images) - 1)
    held_out = Enlarged(images[order[:count].sort().values], IMAGE_SIZE)
    rest = Enlarged(images[order[count:].sort().values], IMAGE_SIZE)
    kept: Iterable[Tensor] = (held_out[i] for i in range(len(held_out)))
    return NormalImages(rest, len(rest), list(kept), fingerprint(rest.small))
