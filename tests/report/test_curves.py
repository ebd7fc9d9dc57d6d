import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from glance_ext.errors import OutputError
from glance_ext.report import plot_losses, plot_roc_pro
from glance_ext.report.curves import Curve

RATES = np.linspace(0, 1, 50)
BLUE, VERMILION = (0, 114, 178), (213, 94, 0)
SHADE = (244, 214, 191)
"""Vermilion at a quarter of its strength on white."""


def curve(power: float, label: str = "AUROC 0.9") -> Curve:
    return label, RATES, RATES**power


def load(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def near(picture: np.ndarray, colour: tuple[int, int, int], tolerance: int = 6) -> np.ndarray:
    return (np.abs(picture - colour) <= tolerance).all(axis=2)


def draw_roc(folder: Path, *args: object, **options: object) -> np.ndarray:
    plot_roc_pro(folder / "c.png", *args, **options)  # type: ignore[arg-type]
    return load(folder / "c.png")


def draw_losses(folder: Path, history: dict[str, list[tuple[int, float]]]) -> np.ndarray:
    plot_losses(folder / "l.png", history)
    return load(folder / "l.png")


def test_every_roc_curve_has_a_panel_and_pro_has_the_last(tmp_path: Path) -> None:
    three = draw_roc(tmp_path, [curve(0.1), curve(0.3)], [curve(0.2)])
    blue = np.flatnonzero(near(three, BLUE).any(axis=0))
    vermilion = np.flatnonzero(near(three, VERMILION).any(axis=0))
    third = three.shape[1] / 3
    assert blue.min() < third < blue.max() < 2 * third < vermilion.min()
    assert (np.diff(blue) > third / 20).sum() == 1
    one = draw_roc(tmp_path, [curve(0.1)], [])
    assert abs(one.shape[1] - third) <= 1
    assert not near(one, VERMILION).any()


def test_curves_follow_the_data(tmp_path: Path) -> None:
    good = draw_roc(tmp_path, [curve(0.02)], [])
    bad = draw_roc(tmp_path, [curve(1.0)], [])
    upper = slice(0, good.shape[0] // 2)
    left = slice(good.shape[1] // 5, good.shape[1] // 2)
    assert near(good, BLUE)[upper, left].sum() > 100
    assert near(bad, BLUE)[upper, left].sum() < 20


def test_pro_is_shaded_up_to_the_limit(tmp_path: Path) -> None:
    widths = {}
    for limit in (0.1, 0.3, 0.9):
        picture = draw_roc(tmp_path, [], [("AUPRO", RATES, np.full(50, 0.8))], limit=limit)
        columns = np.flatnonzero(near(picture, SHADE).sum(axis=0) > 50)
        assert (np.diff(columns) <= 3).all()
        widths[limit] = columns[-1] - columns[0] + 1
        rows = np.flatnonzero(near(picture, SHADE).any(axis=1))
        line = np.flatnonzero(near(picture, VERMILION)[:, columns[0] : columns[-1]].any(axis=1))
        assert rows.min() >= line.min()
    assert widths[0.3] / widths[0.1] == pytest.approx(3, rel=0.1)
    assert widths[0.9] / widths[0.3] == pytest.approx(3, rel=0.05)


def test_shade_follows_the_curve(tmp_path: Path) -> None:
    flat = draw_roc(tmp_path, [], [("", RATES, np.full(50, 0.8))], limit=0.9)
    step = draw_roc(tmp_path, [], [("", RATES, np.where(RATES < 0.7, 0.2, 0.8))], limit=0.9)
    expected = (0.7 * 0.2 + 0.2 * 0.8) / (0.9 * 0.8)
    found = near(step, SHADE).sum() / near(flat, SHADE).sum()
    assert found == pytest.approx(expected, rel=0.07)


def test_shade_ends_at_the_limit_even_between_points(tmp_path: Path) -> None:
    sparse = np.array([0.0, 1.0])
    picture = draw_roc(tmp_path, [], [("AUPRO", sparse, np.full(2, 0.8))], limit=0.5)
    dense = draw_roc(tmp_path, [], [("AUPRO", RATES, np.full(50, 0.8))], limit=0.5)
    assert near(picture, SHADE).sum() == pytest.approx(near(dense, SHADE).sum(), rel=0.01)
    assert near(picture, SHADE).sum() > 1000


def test_labels_and_title_are_drawn(tmp_path: Path) -> None:
    base = draw_roc(tmp_path, [curve(0.1, "image 0.9")], [], title="bottle")
    other_label = draw_roc(tmp_path, [curve(0.1, "image 0.8")], [], title="bottle")
    other_title = draw_roc(tmp_path, [curve(0.1, "image 0.9")], [], title="carpet")
    rows = np.flatnonzero((base != other_label).any(axis=(1, 2)))
    assert rows.size
    assert rows.min() > base.shape[0] / 2
    rows = np.flatnonzero((base != other_title).any(axis=(1, 2)))
    assert rows.size
    assert rows.max() < base.shape[0] / 8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", [r"$\nonsense{$", "日本🔩", "a\nb\udcff", "_hidden", ""])
def test_any_text_can_label_a_curve(tmp_path: Path, text: str) -> None:
    picture = draw_roc(tmp_path, [curve(0.1, text)], [curve(0.2, text)], title=text)
    assert near(picture, BLUE).sum() > 300
    draw_losses(tmp_path, {text: [(0, 1.0), (1, 0.5)]})


def test_label_that_begins_with_an_underscore_is_not_hidden(tmp_path: Path) -> None:
    hidden = draw_losses(tmp_path, {"_a": [(0, 1.0), (9, 1.0)]})
    right = slice(hidden.shape[1] * 3 // 4, None)
    upper = slice(0, hidden.shape[0] // 8)
    assert near(hidden, BLUE)[upper, right].any()


@pytest.mark.filterwarnings("error")
def test_undefined_curve_leaves_an_empty_panel(tmp_path: Path) -> None:
    nothing = np.full(5, np.nan)
    picture = draw_roc(
        tmp_path,
        [("n/a", nothing, nothing)],
        [("n/a", nothing, nothing), ("", RATES[:0], RATES[:0])],
    )
    assert near(picture, BLUE).sum() < 300


def test_curve_of_a_million_points_looks_like_the_same_curve_with_few(tmp_path: Path) -> None:
    many = np.linspace(0, 1, 1_000_000)
    few = np.linspace(0, 1, 2000) ** 3
    one = draw_roc(tmp_path, [("a", many, many**0.3)], [])
    two = draw_roc(tmp_path, [("a", few, few**0.3)], [])
    assert (np.abs(one - two).max(axis=2) > 60).sum() < 60


@pytest.mark.parametrize(
    ("roc", "pro", "limit", "words"),
    [
        ([], [], 0.3, "at least one curve"),
        ([curve(1)], [], 0.0, "limit"),
        ([curve(1)], [], 1.5, "limit"),
        ([("odd", RATES, RATES[1:])], [], 0.3, r"'odd' .*\(50,\) and \(49,\)"),
        ([], [("flat", RATES[None], RATES[None])], 0.3, "'flat'"),
    ],
)
def test_impossible_arguments_are_named(
    tmp_path: Path, roc: list[Curve], pro: list[Curve], limit: float, words: str
) -> None:
    with pytest.raises(ValueError, match=f"^plot_roc_pro: .*{words}"):
        plot_roc_pro(tmp_path / "c.png", roc, pro, limit=limit)
    assert list(tmp_path.iterdir()) == []


def blue_centre(picture: np.ndarray, where: float) -> float:
    """The mean row of the blue line at a fraction of the width."""
    column = round(picture.shape[1] * where)
    return float(np.flatnonzero(near(picture, BLUE, 40)[:, column]).mean())


def test_positive_losses_are_drawn_on_a_log_scale(tmp_path: Path) -> None:
    # What falls exponentially is straight on a log scale, and sags on a linear one.
    falling = [(step, 10.0 ** (-step / 100)) for step in range(401)]
    log = draw_losses(tmp_path, {"loss": falling})
    straight = (blue_centre(log, 0.3) + blue_centre(log, 0.7)) / 2
    assert blue_centre(log, 0.5) == pytest.approx(straight, abs=3)
    linear = draw_losses(tmp_path, {"loss": [*falling, (401, -0.01)]})
    sagging = (blue_centre(linear, 0.2) + blue_centre(linear, 0.6)) / 2
    assert blue_centre(linear, 0.4) > sagging + 10


def test_every_loss_has_its_colour(tmp_path: Path) -> None:
    one = draw_losses(tmp_path, {"a": [(0, 1.0), (9, 2.0)]})
    two = draw_losses(tmp_path, {"a": [(0, 1.0), (9, 2.0)], "b": [(0, 2.0), (9, 1.0)]})
    assert near(one, BLUE).sum() > 300
    assert not near(one, VERMILION).any()
    assert near(two, BLUE).sum() > 300
    assert near(two, VERMILION).sum() > 300


@pytest.mark.filterwarnings("error")
def test_value_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    series = [(step, 1.0) for step in range(100)]
    series[50] = (50, float("nan"))
    series[51] = (51, float("inf"))
    whole = draw_losses(tmp_path, {"a": [(step, 1.0) for step in range(100)]})
    gap = draw_losses(tmp_path, {"a": series})
    lower = slice(whole.shape[0] // 4, None)
    columns = near(whole, BLUE)[lower].any(axis=0) & ~near(gap, BLUE)[lower].any(axis=0)
    assert 10 < columns.sum() < 60


@pytest.mark.filterwarnings("error")
def test_lone_point_is_seen(tmp_path: Path) -> None:
    picture = draw_losses(tmp_path, {"a": [(0, 1.0)]})
    height, width = picture.shape[:2]
    centre = near(picture, BLUE)[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]
    assert centre.sum() > 15


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("history", [{}, {"a": []}, {"a": [(0, float("nan"))]}])
def test_empty_history_says_so(tmp_path: Path, history: dict[str, list[tuple[int, float]]]) -> None:
    picture = draw_losses(tmp_path, history)
    height, width = picture.shape[:2]
    centre = picture[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]
    assert (centre.max(axis=2) < 80).sum() > 100


def test_curves_under_a_file_are_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("here")
    with pytest.raises(OutputError, match=r"a\.png"):
        plot_roc_pro(tmp_path / "taken" / "a.png", [curve(0.1)], [])
    with pytest.raises(OutputError, match=r"a\.png"):
        plot_losses(tmp_path / "taken" / "a.png", {"a": [(0, 1.0)]})
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_the_users_matplotlib_settings_neither_matter_nor_change(tmp_path: Path) -> None:
    expected = draw_losses(tmp_path, {"a": [(0, 1.0), (9, 2.0)]})
    mine = {"axes.facecolor": "black", "text.usetex": True, "savefig.dpi": 30}
    with matplotlib.rc_context(mine):
        found = draw_losses(tmp_path, {"a": [(0, 1.0), (9, 2.0)]})
        assert {name: matplotlib.rcParams[name] for name in mine} == mine
    np.testing.assert_array_equal(found, expected)


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from glance_ext.report import plot_losses\n"
        f"plot_losses({str(tmp_path / 'l.png')!r}, {{'a': [(0, 1.0)]}})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
