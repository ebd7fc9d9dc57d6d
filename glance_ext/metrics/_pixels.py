"""From anomaly maps and masks to one sorted set of pixels with their regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from skimage.measure import label

from glance_ext.metrics._checks import check_binary, check_scores
from glance_ext.metrics.exceptions import UndefinedMetricError


@dataclass(frozen=True, eq=False)
class PixelSet:
    """All pixels of a set of images, split by class and sorted by score.

    Attributes:
        normal: ``(N,)`` ascending scores of the normal pixels.
        anomalous: ``(P,)`` ascending scores of the anomalous pixels.
        region: ``(P,)`` int32, the region of each anomalous pixel, in the order of
            ``anomalous``; regions are numbered through all images.
        region_sizes: ``(R,)`` int64, pixels in each region.
    """

    normal: NDArray[np.floating]
    anomalous: NDArray[np.floating]
    region: NDArray[np.int32]
    region_sizes: NDArray[np.int64]

    @property
    def num_regions(self) -> int:
        """8-connected ground-truth regions in the whole set."""
        return int(self.region_sizes.size)


def collect_pixels(
    anomaly_maps: Sequence[ArrayLike], masks: Sequence[ArrayLike], name: str
) -> PixelSet:
    """Checks the images of the metric ``name``, finds their regions and sorts their pixels.

    Args:
        anomaly_maps: Finite score maps ``(H, W)``.
        masks: One ``(H, W)`` mask per map.
        name: The metric, for messages.

    Raises:
        TypeError: Scores or masks are no real numbers.
        ValueError: The maps and masks do not fit each other, or hold values they may not.
        UndefinedMetricError: There is no map, no anomalous pixel, or no normal pixel.
    """
    if len(anomaly_maps) != len(masks):
        raise ValueError(
            f"{name}: expected one mask per anomaly map, "
            f"got {len(anomaly_maps)} maps and {len(masks)} masks"
        )
    if len(anomaly_maps) == 0:
        raise UndefinedMetricError(f"{name}: expected at least one anomaly map, got none")

    normal_parts, anomalous_parts, region_parts = [], [], []
    num_regions = 0
    for index, (scores, truth) in enumerate(zip(anomaly_maps, masks, strict=True)):
        anomaly_map = check_scores(scores, f"{name}: anomaly_maps[{index}]")
        mask = check_binary(truth, f"{name}: masks[{index}]")
        if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
            raise ValueError(
                f"{name}: expected anomaly_maps[{index}] and masks[{index}] of one shape (H, W), "
                f"got {anomaly_map.shape} and {mask.shape}"
            )
        normal_parts.append(anomaly_map[~mask])
        if not mask.any():
            continue
        anomalous_parts.append(anomaly_map[mask])
        regions, found = label(mask, connectivity=2, return_num=True)
        region_parts.append((regions[mask] + (num_regions - 1)).astype(np.int32))
        num_regions += found

    normal = np.concatenate(normal_parts)
    del normal_parts
    if not anomalous_parts:
        raise UndefinedMetricError(
            f"{name}: expected anomalous pixels, got only normal ones "
            f"({normal.size} in {len(masks)} images)"
        )
    anomalous = np.concatenate(anomalous_parts)
    if normal.size == 0:
        raise UndefinedMetricError(
            f"{name}: expected normal pixels, got only anomalous ones "
            f"({anomalous.size} in {len(masks)} images)"
        )
    region = np.concatenate(region_parts)
    normal.sort()
    order = np.argsort(anomalous, kind="stable")
    return PixelSet(
        normal=normal,
        anomalous=anomalous[order],
        region=region[order],
        region_sizes=np.bincount(region, minlength=num_regions),
    )
