import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from glance_ext.errors import OutputError
from glance_ext.report import overlay, write_png

MAGENTA = (255, 0, 255)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


def grey_image(height: int, width: int, level: float = 0.4) -> np.ndarray:
    return np.full((height, width, 3), level, np.float32)


def noise_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).random((height, width, 3), dtype=np.float32)


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == colour).all(axis=2)


def test_pixels_at_or_under_low_show_the_image_bit_for_bit() -> None:
    image = noise_image(40, 50)
    scores = np.random.default_rng(1).normal(size=(40, 50)).astype(np.float32)
    scores[3, 4] = 0.25
    picture = overlay(image, scores, 0.25, 2.0)
    normal = scores <= 0.25
    eight_bit = np.rint(image * 255).astype(np.uint8)
    assert picture.dtype == np.uint8
    assert picture.shape == (40, 50, 3)
    assert 0 < normal.sum() < normal.size
    np.testing.assert_array_equal(picture[normal], eight_bit[normal])
    clearly = scores > 0.5
    assert (picture[clearly] != eight_bit[clearly]).any(axis=1).mean() > 0.99


def test_image_beyond_its_range_is_clipped_not_wrapped() -> None:
    image = np.float32([[[-0.1, 0.5, 1.2]]])
    assert overlay(image, np.zeros((1, 1), np.float32), 0, 1).tolist() == [[[0, 128, 255]]]


def test_hot_spot_is_opaque_red_and_hides_the_image() -> None:
    scores = np.zeros((20, 20), np.float32)
    scores[5:9, 6:12] = 1.0
    scores[7, 7] = 50.0
    picture = overlay(noise_image(20, 20), scores, 0.0, 1.0)
    hot = picture[5:9, 6:12].reshape(-1, 3)
    assert len(np.unique(hot, axis=0)) == 1
    red, green, blue = hot[0].tolist()
    assert red > 150
    assert red > 3 * green
    assert red > 3 * blue


def test_opacity_rises_linearly_from_low_to_high() -> None:
    scores = np.linspace(-1, 3, 81, dtype=np.float32)[None]
    dark = overlay(grey_image(1, 81, 0.0), scores, 0.0, 2.0).astype(int)
    bright = overlay(grey_image(1, 81, 1.0), scores, 0.0, 2.0).astype(int)
    # What of the image shines through is the difference between a white and a black one.
    shining = (bright - dark)[0] / 255
    expected = 1 - np.clip(scores[0] / 2, 0, 1)
    np.testing.assert_allclose(shining, np.broadcast_to(expected[:, None], (81, 3)), atol=0.005)


def test_colours_go_from_blue_over_green_to_red() -> None:
    scores = np.float32([[0.15, 0.5, 1.0]])
    black = overlay(grey_image(1, 3, 0.0), scores, 0.0, 1.0)[0]
    assert black.argmax(axis=1).tolist() == [2, 1, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_magenta_and_nothing_else_is(value: float) -> None:
    scores = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    scores[2:4, 5:7] = value
    scores[19, 10] = value
    picture = overlay(noise_image(20, 20), scores, 0.2, 0.8, threshold=0.5)
    np.testing.assert_array_equal(is_colour(picture, MAGENTA), ~np.isfinite(scores))


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.0, 1.0), (0.5, 1.0), (0.0, 0.5)])
@pytest.mark.filterwarnings("error")
def test_constant_map_draws_without_warning(low: float, high: float) -> None:
    scores = np.full((8, 8), 0.5, np.float32)
    picture = overlay(grey_image(8, 8), scores, low, high, threshold=0.5)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1
    assert is_colour(picture, (102, 102, 102)).all() == (low == 0.5)


@pytest.mark.filterwarnings("error")
def test_equal_low_and_high_make_a_step() -> None:
    scores = np.float32([[0.4, 0.5, 0.6, 9.0]])
    picture = overlay(grey_image(1, 4), scores, 0.5, 0.5)[0]
    assert is_colour(picture[None], (102, 102, 102))[0].tolist() == [True, True, False, False]
    assert picture[2].tolist() == picture[3].tolist()


@pytest.mark.filterwarnings("error")
def test_scores_near_the_limits_of_float32_neither_overflow_nor_vanish() -> None:
    largest = float(np.finfo(np.float32).max)
    scores = np.float32([[-largest, 0, largest]])
    picture = overlay(grey_image(1, 3, 0.0), scores, -largest, largest)[0]
    assert picture[0].tolist() == [0, 0, 0]
    assert picture.argmax(axis=1).tolist()[1:] == [1, 0]


def test_contour_runs_exactly_on_both_sides_of_the_threshold() -> None:
    rows, columns = np.mgrid[:48, :64]
    scores = (20 - np.hypot(rows - 22, columns - 30)).astype(np.float32)
    picture = overlay(grey_image(48, 64), scores, 100, 200, threshold=8.0)
    region = scores >= 8.0
    inside = np.zeros_like(region)
    outside = np.zeros_like(region)
    for row in range(1, 47):
        for column in range(1, 63):
            neighbours = [
                region[row - 1, column],
                region[row + 1, column],
                region[row, column - 1],
                region[row, column + 1],
            ]
            inside[row, column] = region[row, column] and not all(neighbours)
            outside[row, column] = not region[row, column] and any(neighbours)
    assert inside.sum() > 30
    np.testing.assert_array_equal(is_colour(picture, WHITE), inside)
    np.testing.assert_array_equal(is_colour(picture, BLACK), outside)
    untouched = ~inside & ~outside
    assert is_colour(picture, (102, 102, 102))[untouched].all()


def test_score_equal_to_the_threshold_counts_as_anomalous() -> None:
    scores = np.zeros((5, 5), np.float32)
    scores[2, 2] = 1.0
    picture = overlay(grey_image(5, 5), scores, 5, 6, threshold=1.0)
    assert np.argwhere(is_colour(picture, WHITE)).tolist() == [[2, 2]]
    assert is_colour(picture, BLACK).sum() == 4


def test_contour_does_not_follow_the_border_of_the_image() -> None:
    scores = np.zeros((30, 30), np.float32)
    scores[:, :10] = 1.0
    picture = overlay(grey_image(30, 30), scores, 5, 6, threshold=0.5)
    assert np.unique(np.argwhere(is_colour(picture, WHITE))[:, 1]).tolist() == [9]
    assert np.unique(np.argwhere(is_colour(picture, BLACK))[:, 1]).tolist() == [10]
    assert is_colour(picture, WHITE).sum() == 30


def test_without_threshold_there_is_no_contour() -> None:
    scores = np.zeros((30, 30), np.float32)
    scores[:, :10] = 1.0
    picture = overlay(grey_image(30, 30), scores, 5, 6)
    assert is_colour(picture, (102, 102, 102)).all()


@pytest.mark.parametrize(("side", "width"), [(64, 1), (256, 1), (1024, 4), (2000, 8)])
def test_contour_widens_with_the_image(side: int, width: int) -> None:
    scores = np.zeros((side, side), np.float32)
    scores[:, : side // 2] = 1.0
    row = overlay(grey_image(side, side), scores, 5, 6, threshold=0.5)[side // 3][None]
    edge = side // 2
    white = np.flatnonzero(is_colour(row, WHITE))
    black = np.flatnonzero(is_colour(row, BLACK))
    assert white.tolist() == list(range(edge - width, edge))
    assert black.tolist() == list(range(edge, edge + width))


def test_wide_contour_is_as_wide_in_every_direction() -> None:
    side = 1536
    rows, columns = np.mgrid[:side, :side] - side / 2
    distance = np.hypot(rows, columns).astype(np.float32)
    picture = overlay(grey_image(side, side), -distance, 5, 6, threshold=-400.0)
    depth = 400 - distance[is_colour(picture, WHITE)]
    angle = np.arctan2(rows, columns)[is_colour(picture, WHITE)]
    deepest = [depth[np.abs(angle - a) < 0.02].max() for a in np.linspace(-3, 3, 40)]
    assert min(deepest) > 4.5
    assert max(deepest) < 8


@settings(max_examples=60, deadline=None)
@given(
    scores=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(width=32),
    ),
    bounds=st.tuples(
        st.floats(allow_nan=False, allow_infinity=False, width=32),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
    threshold=st.none() | st.floats(allow_nan=False, width=32),
)
@pytest.mark.filterwarnings("error")
def test_any_map_can_be_drawn(
    scores: np.ndarray, bounds: tuple[float, float], threshold: float | None
) -> None:
    image = noise_image(*scores.shape)
    before = scores.copy(), image.copy()
    picture = overlay(image, scores, min(bounds), max(bounds), threshold=threshold)
    np.testing.assert_array_equal(is_colour(picture, MAGENTA), ~np.isfinite(scores))
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(image, before[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": np.zeros((4, 5), np.float32)}, "expected image"),
        (
            {"anomaly_map": np.zeros((5, 4), np.float32)},
            r"expected anomaly_map .*\(4, 5\).*\(5, 4\)",
        ),
        ({"low": 2.0}, "low <= high, got low=2.0, high=1.0"),
        ({"low": float("nan")}, "finite low"),
        ({"high": float("inf")}, "finite low"),
        ({"threshold": float("nan")}, "expected threshold"),
    ],
)
def test_impossible_arguments_are_named(changes: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "image": grey_image(4, 5),
        "anomaly_map": np.zeros((4, 5), np.float32),
        "low": 0.0,
        "high": 1.0,
    }
    with pytest.raises(ValueError, match=f"^overlay: .*{words}"):
        overlay(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(7, 9, 3), (7, 9)])
def test_png_reads_back_equal(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    write_png(tmp_path / "new folder" / "a.png", pixels[:, ::-1])
    with Image.open(tmp_path / "new folder" / "a.png") as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), pixels[:, ::-1])


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_png_of_what_is_no_picture_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected pixels to be uint8"):
        write_png(tmp_path / "a.png", pixels)
    assert list(tmp_path.iterdir()) == []


def test_png_under_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("here")
    with pytest.raises(OutputError, match=r"a\.png"):
        write_png(tmp_path / "taken" / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken").read_text() == "here"


def test_importing_the_reports_loads_nothing_heavy() -> None:
    code = (
        "import sys, glance_ext.report\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'skimage', 'glance_ext.engine'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
