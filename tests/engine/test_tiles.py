"""Images in overlapping windows: no seams, and a shifted image has a shifted map."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glance_ext.engine import windows as windows_module
from glance_ext.engine.detector import Detector, calibrate
from glance_ext.engine.tiles import (
    TILE_STRIDE,
    Canvas,
    in_batches,
    random_windows,
    tiled_size,
    windows_of,
)
from glance_ext.engine.windows import load_windows, usable
from glance_ext.errors import InputError
from glance_ext.models.glance import Glance, GridPlan, HeadScores
from glance_ext.models.local_net import LocalNet
from tests.engine.test_dense import STANDARDISED


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(Glance(LocalNet(5, 4)), STANDARDISED, tile=True, batch_size=3)


class Flat(Glance):
    """A model that scores nothing, at once."""

    def __init__(self) -> None:
        super().__init__(LocalNet(5, 2))

    def score_grid(self, images: Tensor, plan: GridPlan) -> HeadScores:
        scores = images.mean((1, 2, 3))[:, None].expand(-1, len(plan))
        return HeadScores(scores, scores, scores)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("size", [(256, 256), (257, 448), (500, 1000), (640, 300)])
def test_windows_cover_every_pixel_with_weights_that_add_up_to_one(size: tuple[int, int]) -> None:
    canvas = Canvas(size)
    assert canvas.windows[-1] == (size[0] - 256, size[1] - 256)
    for window in canvas.windows:
        canvas.add(window, torch.ones(256, 256))
    torch.testing.assert_close(canvas.map, torch.ones(size), rtol=1e-6, atol=1e-6)


def test_a_lone_window_is_the_map_bit_by_bit() -> None:
    canvas, expected = Canvas((256, 256)), torch.randn(256, 256)
    assert canvas.windows == [(0, 0)]
    canvas.add((0, 0), expected)
    assert torch.equal(canvas.map, expected)


def test_windows_are_cut_where_they_say() -> None:
    planes = torch.rand(3, 300, 500)
    canvas = Canvas((300, 500))
    assert canvas.windows == [(r, c) for r in (0, 44) for c in (0, 192, 244)]
    for row, column in canvas.windows:
        cut = canvas.cut(planes, (row, column))
        assert torch.equal(cut, planes[:, row : row + 256, column : column + 256])
    places = [(0, window) for window in canvas.windows] + [(1, (0, 0))]
    assert list(windows_of([canvas, Canvas((256, 256))])) == places
    assert [len(some) for some in in_batches(range(7), 3)] == [3, 3, 1]


def test_a_windows_say_falls_smoothly_towards_its_border() -> None:
    """Windows that disagree blend: no step is larger than one pixel's share of the overlap."""
    canvas = Canvas((256 + 2 * TILE_STRIDE, 256 + TILE_STRIDE + 50))
    for index, window in enumerate(canvas.windows):
        canvas.add(window, torch.full((256, 256), float(index % 2)))
    for axis in (0, 1):
        assert float(canvas.map.diff(dim=axis).abs().max()) <= 2 / (256 - TILE_STRIDE)
    assert float(canvas.map.max() - canvas.map.min()) > 0.5


@pytest.mark.parametrize(
    ("size", "expected"),
    [((256, 256), (256, 256)), ((1000, 257), (1000, 257)), ((128, 300), (256, 600)),
     ((300, 100), (768, 256)), ((1, 1), (256, 256)), ((255, 4000), (256, 4016))],
)  # fmt: skip
def test_only_images_with_a_short_side_are_enlarged(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert tiled_size(*size) == expected


def test_an_image_that_would_become_too_large_is_refused() -> None:
    with pytest.raises(MemoryError, match="a 1x10000 image would become 256x2560000"):
        tiled_size(1, 10_000)


# ---------------------------------------------------------------- maps


def texture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x / 11) * np.cos(y / 17) + np.sin((x + 2 * y) / 60)
    pixels = 0.5 + 0.15 * waves[..., None] + 0.1 * rng.standard_normal((height, width, 3))
    return pixels.clip(0, 1).astype(np.float32)


def test_a_shifted_image_gives_a_shifted_map(detector: Detector) -> None:
    side = 256 + 2 * TILE_STRIDE
    scene = texture(side, side)
    whole = detector.detect(scene).map[256:, 256:]
    # the last 8 rows are cut off: windows that stand flush with that border are others
    shifted = detector.detect(scene[TILE_STRIDE : side - 8, TILE_STRIDE:]).map
    flush = side - 8 - TILE_STRIDE - 256  # from here on
    rows, columns = slice(256 - TILE_STRIDE, flush), slice(256 - TILE_STRIDE, None)
    expected = whole[: flush - (256 - TILE_STRIDE)]
    assert expected.shape == (120, 384)
    np.testing.assert_allclose(shifted[rows, columns], expected, rtol=1e-5, atol=1e-5)
    # a map does depend on where its windows are: shifted by less than their stride it is another
    other = detector.detect(scene[TILE_STRIDE + 1 : side - 7, TILE_STRIDE:]).map
    assert np.abs(other[rows, columns][:-1] - expected[1:]).max() > 1e-3


def test_there_is_no_seam_where_windows_end(detector: Detector) -> None:
    found = detector.detect(texture(640, 704)).map
    for axis in (0, 1):
        steps = np.abs(np.diff(found, axis=axis))
        lines = steps.mean(1 - axis)  # of one line of pixels to the next
        ends = [s + e for s in range(0, found.shape[axis] - 255, TILE_STRIDE) for e in (-1, 255)]
        ends = [end for end in ends if 0 <= end < len(lines)]
        inside = np.delete(lines, ends)
        assert len(ends) >= 3
        assert lines[ends].max() < 1.5 * np.quantile(inside, 0.95)


def test_a_tiled_map_is_at_the_images_own_resolution(detector: Detector) -> None:
    image = texture(300, 520)
    found = detector.detect(image)
    assert found.map.shape == (300, 520)
    assert found.score == found.map.max()  # not resized: the score is the map's own
    small = detector.detect(texture(100, 150))
    assert small.map.shape == (100, 150)
    square = texture(256, 256)
    resized = Detector(detector.model, STANDARDISED, tile=False)
    np.testing.assert_array_equal(detector.detect(square).map, resized.detect(square).map)
    assert resized.detect(image).score != found.score


def test_windows_of_several_images_share_batches(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = Glance.score_grid

    def score_grid(self: Glance, images: Tensor, plan: GridPlan) -> HeadScores:
        sizes.append(len(images))
        return real(self, images, plan)

    monkeypatch.setattr(Glance, "score_grid", score_grid)
    images = [texture(300, 256), texture(256, 256), texture(256, 300)]
    together = detector.detect_batch(images)
    assert sizes == [3, 2]
    for image, found in zip(images, together, strict=True):
        np.testing.assert_allclose(found.map, detector.detect(image).map, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units")
def test_a_large_image_takes_memory_for_itself_and_its_map_alone() -> None:
    detector = Detector(Flat(), STANDARDISED, tile=True)
    detector.detect(np.zeros((300, 300, 3), np.float32))
    image = np.zeros((4000, 4000, 3), np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = detector.detect(image)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert found.map.shape == (4000, 4000)
    assert grown < 700  # the image 183 MiB, as planes too, and a map of 61; all windows were 340


# ---------------------------------------------------------------- calibration and training


@pytest.mark.parametrize("tile", [True, False])
def test_calibration_is_of_the_scale_that_detection_has(detector: Detector, tile: bool) -> None:
    images = [texture(300, 320), texture(256, 400)[:, ::-1].copy(), texture(256, 256)]
    prepare = Detector(detector.model, STANDARDISED, tile=tile).prepare
    found = calibrate(
        detector.model,
        [prepare(image) for image in images],
        lambda_s=0.5,
        standardise=True,
        aggregation="mean",
        grid="33",
        tile=tile,
        optimistic=False,
        device=torch.device("cpu"),
    )
    assert found.tile == tile
    again = Detector(detector.model, found)
    assert again.tile == tile  # as calibrated unless named
    scores = [again.detect(image).score for image in images]
    assert found.held_out_scores == pytest.approx(scores, rel=1e-5)


def test_random_windows_are_parts_of_the_image() -> None:
    planes = torch.arange(300 * 500.0).reshape(1, 300, 500).expand(3, -1, -1)
    cuts = random_windows(planes, 4, torch.Generator().manual_seed(0))
    assert cuts.shape == (4, 3, 256, 256)
    for cut in cuts:
        row, column = divmod(int(cut[0, 0, 0]), 500)
        assert torch.equal(cut, planes[:, row : row + 256, column : column + 256])
    assert len({int(cut[0, 0, 0]) for cut in cuts}) == 4
    assert len(random_windows(planes, 99, torch.Generator())) == 6  # as many as tile it
    assert len(random_windows(planes[:, :256, :256], 99, torch.Generator())) == 1


def test_windows_to_train_on_come_from_usable_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "_MOST_WINDOWS", 8)
    paths = []
    for i, size in enumerate([(256, 256), (600, 600), (100, 128)]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((*size, 3), 50 * (i + 1), np.uint8)).save(paths[-1])
    (tmp_path / "bad.png").write_text("none")
    paths.insert(1, tmp_path / "bad.png")
    errors: list[InputError] = []
    cuts, count = load_windows(paths, 0, errors.append)
    assert count == 3
    assert cuts.dtype == torch.float16
    assert [round(float(cut.mean()) * 255) for cut in cuts] == [50, 100, 100, 150, 150]
    assert [error.path for error in errors] == [str(tmp_path / "bad.png")]
    assert usable(paths, errors.append) == [p for p in paths if p.stem != "bad"]
    none, count = load_windows(paths[1:2], 0, errors.append)
    assert (len(none), count) == (0, 0)
    assert len(errors) == 3
