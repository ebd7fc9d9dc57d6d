"""Pixel metrics from disk against their definition, and what they take of memory."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glance_ext.errors import OutputError
from glance_ext.metrics import PixelStore, UndefinedMetricError, _runs, pixel_metrics
from tests.metrics.test_localization import aupro_by_definition, image_sets

CLOSE = {"rel": 1e-12, "abs": 1e-12}


def stored(maps, masks, groups=None, **options) -> PixelStore:
    store = PixelStore(**{"dtype": np.float64, **options})
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        store.add(anomaly_map, mask, group=groups[index] if groups else "")
    return store


@contextmanager
def short_blocks(sample: int) -> Iterator[None]:
    """So that a small set has many splitters, blocks and intervals."""
    before, _runs.SAMPLE = _runs.SAMPLE, sample
    try:
        yield
    finally:
        _runs.SAMPLE = before


def auroc_by_definition(maps, masks) -> Fraction:
    good = np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)]).astype(float)
    bad = np.concatenate([m[mask] for m, mask in zip(maps, masks, strict=True)]).astype(float)
    won = (bad[:, None] > good).sum() * 2 + (bad[:, None] == good).sum()
    return Fraction(int(won), 2 * good.size * bad.size)


@settings(deadline=None)
@given(
    image_sets(),
    st.sampled_from([0.05, 0.3, 1.0]) | st.floats(0.01, 1.0),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_figures_are_those_of_the_definition(images, limit, buffer, sample) -> None:
    maps, masks = images
    with short_blocks(sample), stored(maps, masks, buffer_pixels=buffer) as store:
        found = store.metrics(limit=limit)
        alone = store.aupro(limit=limit)
    expected = pixel_metrics(maps, masks, limit)
    assert found.pixel_AUROC == float(auroc_by_definition(maps, masks))
    assert found.pixel_AUPRO == pytest.approx(
        float(aupro_by_definition(maps, masks, limit)), **CLOSE
    )
    assert alone == found.pixel_AUPRO
    assert (found.pixel_F1Max, found.threshold) == (expected.pixel_F1Max, expected.threshold)
    assert found.pro.num_regions == expected.pro.num_regions
    assert (found.roc.fpr[0], found.roc.tpr[0], found.roc.thresholds[0]) == (0, 0, np.inf)
    assert (found.roc.fpr[-1], found.roc.tpr[-1], found.pro.pro[-1]) == (1, 1, 1)


def random_set(count: int, tied: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(count)
    maps, masks = [], []
    for index in range(count):
        mask = np.zeros((60, 50 + index), bool)
        if index % 3:
            mask[5:20, 5:20] = True
            mask[20:25, 20 : 22 + index] = True  # touches the first at a corner
            mask[40:43, 3:30] = True
        scores = rng.standard_normal(mask.shape) + mask * rng.random()
        maps.append((np.round(scores, 1) if tied else scores).astype(np.float32))
        masks.append(mask)
    return maps, masks


@pytest.mark.parametrize("tied", [False, True])
def test_any_buffer_gives_the_same_figures(tied: bool) -> None:
    maps, masks = random_set(9, tied)
    expected = pixel_metrics(maps, masks)
    for buffer, sample in ((500, 16), (4000, 64), (10**6, 1024)):
        with (
            short_blocks(sample),
            stored(maps, masks, dtype=np.float32, buffer_pixels=buffer) as store,
        ):
            found = store.metrics()
        assert found.pixel_AUROC == expected.pixel_AUROC
        assert found.pixel_AUPRO == pytest.approx(expected.pixel_AUPRO, **CLOSE)
        assert found.pixel_F1Max == expected.pixel_F1Max
        assert found.threshold == expected.threshold
        for mine, theirs in ((found.roc.tpr, expected.roc.tpr), (found.pro.pro, expected.pro.pro)):
            near, x = 1 / 2000, expected.roc.fpr
            assert (np.interp(x - near, found.roc.fpr, mine) - near <= theirs).all()
            assert (np.interp(x + near, found.roc.fpr, mine) + near >= theirs).all()


def test_thresholds_of_the_curve_are_the_scores_that_reach_them() -> None:
    maps, masks = random_set(4, True)
    with stored(maps, masks) as store:
        roc = store.metrics().roc
    scores = np.concatenate([m.astype(np.float64).ravel() for m in maps])
    truth = np.concatenate([mask.ravel() for mask in masks])
    for fpr, tpr, threshold in zip(roc.fpr, roc.tpr, roc.thresholds, strict=True):
        assert tpr == (scores[truth] >= threshold).mean()
        assert fpr == (scores[~truth] >= threshold).mean()


def test_groups_are_measured_together_or_alone() -> None:
    maps, masks = random_set(9, False)
    groups = ["good" if not index % 3 else f"kind {index % 3}" for index in range(9)]
    with stored(maps, masks, groups) as store:
        for wanted in ({"good", "kind 1"}, {"kind 2"}, {"good", "kind 1", "kind 2"}):
            part = [i for i in range(9) if groups[i] in wanted]
            expected = pixel_metrics([maps[i] for i in part], [masks[i] for i in part])
            assert store.aupro(wanted) == pytest.approx(expected.pixel_AUPRO, **CLOSE)
            assert store.metrics(wanted).pixel_AUROC == expected.pixel_AUROC
        with pytest.raises(UndefinedMetricError, match="only normal ones"):
            store.aupro({"good"})


def test_maps_can_be_added_after_a_figure() -> None:
    maps, masks = random_set(6, True)
    with stored(maps[:3], masks[:3]) as store:
        assert store.metrics().pixel_AUROC == pixel_metrics(maps[:3], masks[:3]).pixel_AUROC
        for anomaly_map, mask in zip(maps[3:], masks[3:], strict=True):
            store.add(anomaly_map, mask)
        assert store.metrics().pixel_AUROC == pixel_metrics(maps, masks).pixel_AUROC


def test_constant_maps_are_counted_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((300, 300), bool)
    mask[:90, :90] = True
    scores = np.full((300, 300), -7.5, np.float32)
    monkeypatch.setattr(_runs, "SAMPLE", 16)
    with stored([scores] * 4, [mask] * 4, dtype=np.float32, buffer_pixels=2000) as store:
        largest = 0
        read = _runs.Spill.read

        def watched(self, start, stop):
            nonlocal largest
            largest = max(largest, stop - start)
            return read(self, start, stop)

        monkeypatch.setattr(_runs.Spill, "read", watched)
        found = store.metrics(limit=0.25)
    assert found.pixel_AUROC == 0.5
    assert found.pixel_AUPRO == 0.125
    assert found.roc.thresholds.tolist() == [np.inf, -7.5]
    assert largest <= 2000


@pytest.mark.parametrize("limit", [1e-6, 0.3, 1.0])
def test_perfect_maps_have_an_aupro_of_exactly_one(limit: float) -> None:
    rng = np.random.default_rng(1)
    masks = [rng.random((33, 41)) < 0.1 for _ in range(3)]
    maps = [rng.random(mask.shape) + 2.0 * mask for mask in masks]
    with stored(maps, masks, buffer_pixels=100) as store:
        found = store.metrics(limit=limit)
    assert (found.pixel_AUPRO, found.pixel_AUROC, found.pixel_F1Max) == (1.0, 1.0, 1.0)


def test_a_map_that_is_not_finite_is_named_and_left_out() -> None:
    maps, masks = random_set(3, False)
    broken = maps[1].copy()
    broken[4, 7] = np.nan
    with stored(maps, masks) as store:
        with pytest.raises(ValueError, match=r"bad\.png: anomaly map: .* index \(4, 7\) \(nan\)"):
            store.add(broken, masks[1], name="bad.png")
        assert store.metrics().pixel_AUROC == pixel_metrics(maps, masks).pixel_AUROC


def test_what_does_not_fit_is_refused() -> None:
    with stored([], [], dtype=np.float32) as store:
        with pytest.raises(ValueError, match=r"x: .* got \(2, 3\) and \(3, 2\)"):
            store.add(np.zeros((2, 3)), np.zeros((3, 2), bool), name="x")
        with pytest.raises(ValueError, match=r"x: expected scores that float32 holds exactly"):
            store.add(np.full((2, 3), 0.1), np.zeros((2, 3), bool), name="x")
        store.add(np.full((2, 3), 0.5), np.zeros((2, 3), bool))  # float64, but exact in float32
    with pytest.raises(TypeError, match="expected dtype float32 or float64, got float16"):
        PixelStore(dtype=np.float16)
    with pytest.raises(ValueError, match="expected buffer_pixels >= 1, got 0"):
        PixelStore(buffer_pixels=0)
    with stored(*random_set(2, True)) as store, pytest.raises(ValueError, match="expected limit"):
        store.aupro(limit=0.0)


def test_sets_without_one_class_leave_the_figures_undefined() -> None:
    scores = np.zeros((2, 3))
    with stored([], []) as store, pytest.raises(UndefinedMetricError, match="got none"):
        store.metrics()
    for mask, message in ((np.zeros((2, 3), bool), r"only normal ones \(6\)"),
                          (np.ones((2, 3), bool), r"only anomalous ones \(6\)")):  # fmt: skip
        with (
            stored([scores], [mask]) as store,
            pytest.raises(UndefinedMetricError, match=message),
        ):
            store.metrics()


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    maps, masks = random_set(3, False)
    with stored(maps, masks, folder=tmp_path / "new", buffer_pixels=100) as store:
        store.metrics()
        assert os.listdir(tmp_path / "new") == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: cannot keep pixels of anomaly maps there"):
        PixelStore(tmp_path / "file")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, masks = random_set(3, False)
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(_runs.tempfile, "TemporaryFile", lambda **_: full)
    store = stored(maps[:1], masks[:1], folder=tmp_path, buffer_pixels=100_000)
    with pytest.raises(OutputError, match=r"cannot keep pixels .* there: No space left"):
        store.metrics()
    full.close()


def test_memory_does_not_grow_with_the_number_of_maps() -> None:
    """Forty maps of 1024x1024 hold 160 MiB of scores; ten times as many take no more memory."""
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((1024, 1024), dtype=np.float32)
    mask = np.zeros((1024, 1024), bool)
    mask[100:400, 200:500] = True
    peaks = []
    for count in (8, 40):
        tracemalloc.start()
        try:
            with PixelStore(buffer_pixels=2**20) as store:
                for index in range(count):
                    scores = np.roll(noise, 1000 * index) + np.float32(index / 7)
                    store.add(scores, mask if index % 2 else ~mask & mask)
                store.metrics()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 64 * 2**20
