"""Scores on disk, in sorted runs, and a walk through them from the highest to the lowest.

What an external merge sort does, but for its output: intervals of scores that fit in memory are
read from all runs and handed on. An interval ends at a *splitter*, a score whose pixels are
counted, not read, so that any number of equal scores takes no memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glance_ext.errors import OutputError

# Of every sorted run each so-manieth score stays in memory, to find places in it by one short read.
SAMPLE = 1024


class Spill:
    """An array on disk that grows at its end; its file has no name and ends with the process.

    Args:
        folder: Where to keep it; None for the system's folder for temporary files.
        dtype: Of the elements.

    Raises:
        OutputError: The folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, dtype: DTypeLike) -> None:
        self._folder = tempfile.gettempdir() if folder is None else os.fspath(folder)
        self._dtype = np.dtype(dtype)
        self.size = 0
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error

    def append(self, values: NDArray[Any]) -> int:
        """Writes contiguous values; returns the index of the first of them."""
        start = self.size
        try:
            self._file.seek(start * self._dtype.itemsize)
            self._file.write(values.data)
        except OSError as error:
            raise self._refused(error) from error
        self.size += values.size
        return start

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The values from ``start`` to before ``stop``."""
        values = np.empty(stop - start, self._dtype)
        try:
            self._file.seek(start * self._dtype.itemsize)
            count = self._file.readinto(values.data.cast("B")) if values.size else 0
        except OSError as error:
            raise self._refused(error) from error
        if count != values.nbytes:
            raise OutputError(f"{self._folder}: pixels kept there were cut short")
        return values

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()

    def _refused(self, error: OSError) -> OutputError:
        reason = error.strerror or str(error)
        return OutputError(f"{self._folder}: cannot keep pixels of anomaly maps there: {reason}")


@dataclass(frozen=True, eq=False)
class Run:
    """Ascending scores on disk.

    Attributes:
        scores: Where they are.
        regions: Where the region of each is, at the same index; None for normal pixels.
        start: Index of the first.
        size: How many there are.
        samples: Every :data:`SAMPLE`-th of them, from the first on.
        group: The group of their images.
    """

    scores: Spill
    regions: Spill | None
    start: int
    size: int
    samples: NDArray[np.floating]
    group: str

    def position(self, score: np.floating, side: str) -> int:
        """How many scores are below ``score`` (side left), or not above it (right)."""
        block = int(np.searchsorted(self.samples, score, side))  # type: ignore[call-overload]
        if block == 0:
            return 0
        first = (block - 1) * SAMPLE
        values = self.read(first, min(block * SAMPLE, self.size))
        return first + int(np.searchsorted(values, score, side))  # type: ignore[call-overload]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Scores by their place in the run."""
        return self.scores.read(self.start + start, self.start + stop)

    def read_regions(self, start: int, stop: int) -> NDArray[np.int32]:
        """Regions by their place in the run."""
        assert self.regions is not None
        return self.regions.read(self.start + start, self.start + stop)


def write_run(
    scores: NDArray[np.floating],
    regions: NDArray[np.int32] | None,
    files: tuple[Spill, Spill | None],
    group: str,
) -> Run:
    """Sorts pixels and writes them.

    Args:
        scores: ``(n,)``; sorted in place where there are no regions.
        regions: ``(n,)``, or None for normal pixels.
        files: Where to write scores and regions.
        group: The group of their images.
    """
    if regions is None:
        scores.sort()
    else:
        order = np.argsort(scores)
        scores, regions = scores[order], regions[order]
    start = files[0].append(scores)
    if regions is not None:
        assert files[1] is not None
        files[1].append(regions)
    return Run(*files, start, scores.size, scores[::SAMPLE].copy(), group)


@dataclass(frozen=True, eq=False)
class Interval:
    """Pixels of an interval of scores, by the distinct scores of the anomalous ones among them.

    Attributes:
        scores: ``(D,)`` distinct scores of anomalous pixels, from the highest to the lowest.
        hits: ``(D,)`` int64, anomalous pixels with each score.
        whole: ``(D,)`` int64, their weights, the whole units.
        rest: ``(D,)`` int64, their weights, the rest below one unit.
        above: ``(D,)`` int64, normal pixels of the interval above each score.
        reached: ``(D,)`` int64, normal pixels of the interval at or above each score.
        normal: Normal pixels of the interval.
    """

    scores: NDArray[np.floating]
    hits: NDArray[np.int64]
    whole: NDArray[np.int64]
    rest: NDArray[np.int64]
    above: NDArray[np.int64]
    reached: NDArray[np.int64]
    normal: int


def walk(
    normal: Sequence[Run],
    anomalous: Sequence[Run],
    whole: NDArray[np.int64],
    rest: NDArray[np.int64],
    most: int,
) -> Iterator[Interval]:
    """Goes through the pixels of some runs from the highest score to the lowest.

    Args:
        normal: Runs of normal pixels.
        anomalous: Runs of anomalous pixels.
        whole: ``(R,)``, what a pixel of each region weighs, the whole units.
        rest: ``(R,)``, the rest.
        most: About as many pixels are in memory at a time; more if there are so many runs.

    Yields:
        Intervals that follow each other; every pixel is in one.
    """
    runs = [*normal, *anomalous]
    samples = np.sort(np.concatenate([run.samples for run in runs]))
    # Between two samples so many apart are at most step + len(runs) blocks of SAMPLE pixels.
    step = max(most // SAMPLE - len(runs), len(runs), 1)
    splitters = np.unique(samples[::step])[::-1]  # the lowest of all scores is the last of them
    n = len(normal)
    tops = [run.size for run in runs]
    for splitter in splitters:
        ends = [run.position(splitter, "right") for run in runs]
        spans = list(zip(runs, ends, tops, strict=True))
        if any(start < stop for _, start, stop in spans):
            yield _between(spans[:n], spans[n:], whole, rest)
        tops = [run.position(splitter, "left") for run in runs]
        spans = list(zip(runs, tops, ends, strict=True))
        yield _tied(splitter, spans[:n], spans[n:], whole, rest, most)


Span = tuple[Run, int, int]


def _between(
    normal: Sequence[Span],
    anomalous: Sequence[Span],
    whole: NDArray[np.int64],
    rest: NDArray[np.int64],
) -> Interval:
    """The pixels between two splitters, both excluded."""
    count = sum(stop - start for _, start, stop in normal)
    if all(start == stop for _, start, stop in anomalous):
        return _without_anomalous(normal, count)
    some = np.concatenate([run.read(start, stop) for run, start, stop in anomalous])
    regions = np.concatenate([run.read_regions(start, stop) for run, start, stop in anomalous])
    order = np.argsort(some)
    some, regions = some[order], regions[order]
    first = np.flatnonzero(np.concatenate([[True], some[1:] != some[:-1]]))
    scores = some[first]
    hits = np.diff(np.append(first, some.size))
    parts = [run.read(start, stop) for run, start, stop in normal if start < stop]
    good = np.concatenate(parts) if parts else some[:0]
    good.sort()
    return Interval(
        scores=scores[::-1],
        hits=hits[::-1],
        whole=np.add.reduceat(whole[regions], first)[::-1],
        rest=np.add.reduceat(rest[regions], first)[::-1],
        above=(count - np.searchsorted(good, scores, "right"))[::-1],
        reached=(count - np.searchsorted(good, scores, "left"))[::-1],
        normal=count,
    )


def _tied(
    score: np.floating,
    normal: Sequence[Span],
    anomalous: Sequence[Span],
    whole: NDArray[np.int64],
    rest: NDArray[np.int64],
    most: int,
) -> Interval:
    """The pixels with one score, however many."""
    count = sum(stop - start for _, start, stop in normal)
    hits = units = rests = 0
    for run, start, stop in anomalous:
        hits += stop - start
        for first in range(start, stop, most):
            regions = run.read_regions(first, min(first + most, stop))
            units += int(whole[regions].sum())
            rests += int(rest[regions].sum())
    if not hits:
        return _without_anomalous(normal, count)

    def one(value: int) -> NDArray[np.int64]:
        return np.array([value], np.int64)

    scores = np.array([score])
    return Interval(scores, one(hits), one(units), one(rests), one(0), one(count), count)


def _without_anomalous(normal: Sequence[Span], count: int) -> Interval:
    """Normal pixels alone are only counted."""
    none = np.empty(0, np.int64)
    return Interval(np.empty(0), none, none, none, none, none, count)
