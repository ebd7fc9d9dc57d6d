"""Exact pixel metrics of any number of anomaly maps in bounded memory.

The maps' pixels are kept on disk and never all in memory. No score is binned or rounded: the
figures are those of :func:`~glance_ext.metrics.localization.pixel_metrics`, by another way.

Between two neighbouring scores of anomalous pixels both curves are level, since there only false
positives are added. So a curve has its corners at the scores of anomalous pixels, and of the
normal pixels only their number above and at each of those is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from skimage.measure import label

from glance_ext.metrics._checks import check_binary, check_limit, check_scores
from glance_ext.metrics._runs import Run, Spill, walk, write_run
from glance_ext.metrics.classification import RocCurve
from glance_ext.metrics.exceptions import UndefinedMetricError
from glance_ext.metrics.localization import PixelMetrics, ProCurve

_REST = 30  # bits of a pixel's weight below one unit
_RESOLUTION = 2000  # corners of a curve that are kept, along each of its axes


class PixelStore:
    """Pixels of anomaly maps with their ground truth, on disk; its figures are exact.

    Memory holds the buffers, one interval of scores at a time, one score in 1024, and 8 bytes for
    each region. A pixel takes 4 bytes on disk, an anomalous one 8.

    Args:
        folder: Where the pixels are kept, in files without a name; None for the system's folder
            for temporary files (``TMPDIR``).
        dtype: What scores are kept as: float32, or float64.
        buffer_pixels: Pixels that are sorted at a time; memory is about 16 bytes for each.

    Raises:
        OutputError: The folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        dtype: DTypeLike = np.float32,
        buffer_pixels: int = 2**22,
    ) -> None:
        self._dtype = np.dtype(dtype)
        if self._dtype not in (np.float32, np.float64):
            raise TypeError(f"PixelStore: expected dtype float32 or float64, got {self._dtype}")
        if buffer_pixels < 1:
            raise ValueError(f"PixelStore: expected buffer_pixels >= 1, got {buffer_pixels}")
        self._most = buffer_pixels
        self._normal = _Buffer(folder, self._dtype, buffer_pixels, with_regions=False)
        self._anomalous = _Buffer(
            folder, self._dtype, max(1, buffer_pixels // 4), with_regions=True
        )
        self._sizes: list[NDArray[np.int64]] = []
        self._owners: list[str] = []  # of each array of sizes, its group
        self._regions = 0

    def __enter__(self) -> PixelStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the space on disk back."""
        self._normal.close()
        self._anomalous.close()

    def add(
        self, anomaly_map: ArrayLike, mask: ArrayLike, *, group: str = "", name: str = "add"
    ) -> None:
        """Adds one image; one that is refused leaves the store as it was.

        Args:
            anomaly_map: ``(H, W)`` finite scores, high means anomalous.
            mask: ``(H, W)``, True or 1 for anomalous pixels.
            group: Images of one group can be measured together with those of others, or alone.
                Groups that take turns cost a run of sorted pixels at each change.
            name: What messages call the image.

        Raises:
            TypeError: Scores or mask are no real numbers.
            ValueError: The shapes differ, a score is not finite, or does not fit the dtype.
            OutputError: The disk is full.
        """
        scores = check_scores(anomaly_map, f"{name}: anomaly map")
        truth = check_binary(mask, f"{name}: mask")
        if scores.ndim != 2 or scores.shape != truth.shape:
            raise ValueError(
                f"{name}: expected an anomaly map and a mask of one shape (H, W), "
                f"got {scores.shape} and {truth.shape}"
            )
        kept = scores.astype(self._dtype, copy=False)
        if kept.dtype.itemsize < scores.dtype.itemsize and not np.array_equal(kept, scores):
            raise ValueError(
                f"{name}: expected scores that {self._dtype} holds exactly, got {scores.dtype}; "
                "PixelStore(dtype=np.float64) keeps those"
            )
        rows = np.flatnonzero(truth.any(1))
        if not rows.size:
            self._normal.add(kept.reshape(-1), None, group)
            return
        columns = np.flatnonzero(truth.any(0))
        inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        box = truth[inside]
        regions = label(box, connectivity=2)[box]
        sizes = np.bincount(regions)[1:]
        self._normal.add(kept[~truth], None, group)
        numbers = (regions + (self._regions - 1)).astype(np.int32)
        self._anomalous.add(kept[inside][box], numbers, group)
        self._sizes.append(sizes)
        self._owners.append(group)
        self._regions += sizes.size

    def metrics(self, groups: Collection[str] | None = None, limit: float = 0.3) -> PixelMetrics:
        """AUROC, AUPRO and F1Max over all pixels, and both curves.

        Args:
            groups: Of which groups of images; None for all.
            limit: False positive rate at which the AUPRO integral ends, in (0, 1].

        Returns:
            Exact figures. Of the curves' corners only so many are there that what is left out
            lies within 1/2000 of the line through the others.

        Raises:
            ValueError: ``limit`` is out of range.
            UndefinedMetricError: There is no map, no anomalous pixel, or no normal pixel.
        """
        check_limit(limit, "metrics")
        corners = _Corners(self, groups)
        area = _Area(limit, corners.normal)
        curve = _Curve(corners.normal, corners.anomalous)
        pairs, best = 0, (0.0, math.inf)
        for fp, tp, pro, thresholds in corners:
            heights = tp[1:] + tp[:-1]
            pairs += int((heights * np.diff(fp)).sum())
            area.add(fp, pro)
            f1 = 2.0 * tp[1:] / (tp[1:] + fp[1:] + corners.anomalous)
            top = int(np.argmax(f1))  # the first of equals, and thresholds fall
            if f1[top] > best[0]:
                best = float(f1[top]), float(thresholds[1 + top])
            curve.add(fp, tp, pro, thresholds)
        fpr, tpr, overlap, levels = curve.arrays()
        return PixelMetrics(
            pixel_AUROC=pairs / (2 * corners.normal * corners.anomalous),
            pixel_AUPRO=area.mean,
            pixel_F1Max=best[0],
            threshold=best[1],
            roc=RocCurve(fpr, tpr, levels),
            pro=ProCurve(fpr, overlap, levels, corners.num_regions),
        )

    def aupro(self, groups: Collection[str] | None = None, limit: float = 0.3) -> float:
        """AUPRO alone; scores below those of the false positives that count are not read.

        Args:
            groups: Of which groups of images; None for all.
            limit: False positive rate at which the integral ends, in (0, 1].

        Raises:
            ValueError: ``limit`` is out of range.
            UndefinedMetricError: There is no map, no anomalous pixel, or no normal pixel.
        """
        check_limit(limit, "aupro")
        corners = _Corners(self, groups)
        area = _Area(limit, corners.normal)
        for fp, _, pro, _ in corners:
            area.add(fp, pro)
            if area.done:
                break
        return area.mean

    def _selected(
        self, groups: Collection[str] | None
    ) -> tuple[list[Run], list[Run], NDArray[np.int64], NDArray[np.bool_]]:
        """Runs of normal and anomalous pixels, all regions' sizes, and which of them count."""

        def chosen(group: str) -> bool:
            return groups is None or group in groups

        sizes = np.concatenate([*self._sizes, np.empty(0, np.int64)]).astype(np.int64)
        counts = [np.full(s.size, chosen(o)) for s, o in zip(self._sizes, self._owners)]  # noqa: B905
        return (
            [run for run in self._normal.runs() if chosen(run.group)],
            [run for run in self._anomalous.runs() if chosen(run.group)],
            sizes,
            np.concatenate([*counts, np.empty(0, np.bool_)]),
        )


class _Buffer:
    """Pixels of one class on their way to disk, where they lie in sorted runs."""

    def __init__(
        self, folder: Any, dtype: np.dtype[Any], capacity: int, *, with_regions: bool
    ) -> None:
        self._files = Spill(folder, dtype), Spill(folder, np.int32) if with_regions else None
        self._scores: NDArray[Any] = np.empty(capacity, dtype)
        self._regions = np.empty(capacity, np.int32) if with_regions else None
        self._used = 0
        self._group = ""
        self._runs: list[Run] = []

    def add(self, scores: NDArray[Any], regions: NDArray[np.int32] | None, group: str) -> None:
        if group != self._group:
            self._flush()
            self._group = group
        done = 0
        while done < scores.size:
            if self._used == self._scores.size:
                self._flush()
            count = min(scores.size - done, self._scores.size - self._used)
            place = slice(self._used, self._used + count)
            self._scores[place] = scores[done : done + count]
            if self._regions is not None and regions is not None:
                self._regions[place] = regions[done : done + count]
            self._used += count
            done += count

    def runs(self) -> list[Run]:
        """All pixels, on disk."""
        self._flush()
        return self._runs

    def _flush(self) -> None:
        if not self._used:
            return
        regions = None if self._regions is None else self._regions[: self._used]
        self._runs.append(write_run(self._scores[: self._used], regions, self._files, self._group))
        self._used = 0

    def close(self) -> None:
        for file in self._files:
            if file is not None:
                file.close()


_Points = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]


class _Corners:
    """The corners of both curves, from the threshold +inf on, some at a time.

    Iterating gives false positives, true positives, PRO and thresholds, arrays of one length; each
    set begins with the last corner of the one before.
    """

    def __init__(self, store: PixelStore, groups: Collection[str] | None) -> None:
        self._normal, self._anomalous, sizes, counts = store._selected(groups)
        self._most = store._most
        self.normal = sum(run.size for run in self._normal)
        self.anomalous = sum(run.size for run in self._anomalous)
        self.num_regions = int(np.count_nonzero(counts))
        if not self.normal and not self.anomalous:
            raise UndefinedMetricError("PixelStore: expected at least one anomaly map, got none")
        for count, wanted, only in (
            (self.anomalous, "anomalous", "normal"),
            (self.normal, "normal", "anomalous"),
        ):
            if not count:
                raise UndefinedMetricError(
                    f"PixelStore: expected {wanted} pixels, got only {only} ones "
                    f"({self.normal + self.anomalous})"
                )
        # A pixel weighs 1 / size of its region, in units so small that the weights of all pixels
        # stay below 2**61; sums of whole units, and of rests, are exact in integers.
        scale = 1 << (61 - max(1, sizes.size).bit_length())
        self._whole = scale // sizes
        self._rest = (scale % sizes << _REST) // sizes
        self._all = (
            int((self._whole * sizes)[counts].sum()),
            int((self._rest * sizes)[counts].sum()),
        )

    def __iter__(self) -> Iterator[_Points]:
        total = _joined(*(np.array([part]) for part in self._all))
        passed = fp = tp = whole = rest = 0  # passed: normal pixels of all intervals so far
        pro, threshold = 0.0, math.inf
        for part in walk(self._normal, self._anomalous, self._whole, self._rest, self._most):
            if part.scores.size:
                # Two corners for each score: above it, and with all that have it.
                fps = passed + _interleaved(part.above, part.reached)
                tps = _running(tp, part.hits)
                pros = _joined(_running(whole, part.whole), _running(rest, part.rest)) / total
                with np.errstate(over="ignore"):  # above the greatest number there is +inf
                    above = np.nextafter(part.scores, np.inf, dtype=part.scores.dtype)
                levels = _interleaved(above, part.scores).astype(np.float64) + 0.0
                yield (
                    np.insert(fps, 0, fp),
                    np.insert(_interleaved(tps[:-1], tps[1:]), 0, tp),
                    np.insert(_interleaved(pros[:-1], pros[1:]), 0, pro),
                    np.insert(levels, 0, threshold),
                )
                fp, tp, pro, threshold = int(fps[-1]), int(tps[-1]), float(pros[-1]), levels[-1]
                whole += int(part.whole.sum())
                rest += int(part.rest.sum())
            passed += part.normal
        lowest = min(float(run.samples[0]) for run in (*self._normal, *self._anomalous)) + 0.0
        yield (
            np.array([fp, self.normal]),
            np.array([tp, self.anomalous]),
            np.array([pro, 1.0]),
            np.array([threshold, lowest]),
        )


def _running(start: int, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """``start`` and the sums after each step, ``(D + 1,)``."""
    return start + np.concatenate([[0], np.cumsum(steps)])


def _interleaved(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    return np.stack((first, second), 1).reshape(-1)


def _joined(whole: NDArray[np.int64], rest: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whole units and rests as one number; the same integers always give the same one."""
    value: NDArray[np.float64] = whole + rest * 2.0**-_REST
    return value


class _Area:
    """Integral of PRO over the count of false positives, whose steps are exact."""

    def __init__(self, limit: float, normal: int) -> None:
        self._end = limit * normal
        self._parts: list[float] = []
        self.done = False

    def add(self, fp: NDArray[np.int64], pro: NDArray[np.float64]) -> None:
        if self.done:
            return
        inside = int(np.searchsorted(fp, self._end, side="right"))  # points with fp <= end
        heights = pro[1:inside] + pro[: inside - 1]
        self._parts.append(0.5 * float((heights * np.diff(fp[:inside])).sum()))
        if inside < fp.size:
            width = self._end - int(fp[inside - 1])
            slope = (pro[inside] - pro[inside - 1]) / int(fp[inside] - fp[inside - 1])
            at_end = pro[inside - 1] + slope * width
            self._parts.append(0.5 * float(pro[inside - 1] + at_end) * width)
            self.done = True

    @property
    def mean(self) -> float:
        """The integral over its width: PRO's mean up to the limit."""
        return math.fsum(self._parts) / self._end


class _Curve:
    """Picks so many corners that the curves look the same.

    All three rates rise. Wherever their sum passes a multiple of 1/2000, the corners on both
    sides stay, so that a corner before a long straight segment is not cut.
    """

    def __init__(self, normal: int, anomalous: int) -> None:
        self._counts = normal, anomalous
        self._kept: list[_Points] = []

    def add(self, *points: NDArray[Any]) -> None:
        fp, tp, pro, _ = points
        way = np.floor((fp / self._counts[0] + tp / self._counts[1] + pro) * _RESOLUTION)
        passes = np.flatnonzero(way[1:] != way[:-1])
        keep = np.unique(np.concatenate([passes, passes + 1]))
        if not self._kept:
            keep = np.union1d(keep, [0])
        self._kept.append(tuple(array[keep] for array in points))

    def arrays(self) -> tuple[NDArray[np.float64], ...]:
        """FPR, TPR, PRO and thresholds, from 0 to 1."""
        fp, tp, pro, thresholds = (np.concatenate(part) for part in zip(*self._kept, strict=True))
        moved = (np.diff(fp) > 0) | (np.diff(tp) > 0)
        keep = np.concatenate([[True], moved])
        return (
            fp[keep] / self._counts[0],
            tp[keep] / self._counts[1],
            pro[keep],
            thresholds[keep],
        )
