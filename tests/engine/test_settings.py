import pytest

from glance_ext.engine.distill import DistillSettings
from glance_ext.engine.settings import PRESETS, TrainSettings, learnt, preset
from glance_ext.errors import GlanceError


def test_the_papers_preset_has_the_papers_numbers() -> None:
    paper = PRESETS["paper"]
    assert (paper.fine_tune_steps, paper.fine_tune_batch_size) == (50_000, 16)
    assert paper.fine_tune_learning_rate == 2e-4
    assert (paper.steps, paper.batch_size) == (200_000, 64)
    assert (paper.global_learning_rate, paper.head_learning_rate) == (1e-4, 1e-5)
    assert (paper.lambda_t, paper.lambda_s) == (0.01, 0.8)
    assert paper.grid == "paper"
    assert paper.local_net == "deep"
    assert (paper.holes_per_image, paper.positions, paper.stain_uses) == (1, "uniform", 1)
    assert not paper.standardise
    assert (paper.stains, paper.aggregation) == ("small", "mean")
    assert not paper.whiten
    assert (paper.memory_size, paper.surprisal, paper.turns) == (0, False, False)
    assert (paper.patch_scale, paper.distortion, paper.head_steps) == (1, "stain", 0)


def test_presets_have_the_shares_that_were_chosen_with_and_without_a_head_in_context() -> None:
    quick, default = preset("quick"), preset("default")
    assert (quick.context_steps, quick.memory_share) == (0, 0.5)
    assert default.context_steps > 0
    assert (default.memory_drawn, default.grain) == (0.25, True)
    assert (default.memory_share, default.context_share, default.pieces) == (0.4, 0.75, 3)


def test_training_sees_every_patch_of_the_grid_unless_positions_are_named() -> None:
    assert preset("default").positions == "4"
    assert preset("default", grid="8").positions == "4"
    assert preset("default", grid="paper").positions == "uniform"
    assert preset("default", grid="2").positions == "uniform"
    assert preset("default", grid="paper", positions="4").positions == "4"
    assert learnt("paper", "uniform")
    assert learnt("16", "4")
    assert not learnt("5", "4")


def test_images_are_not_turned_where_turned_patches_are_to_be_told() -> None:
    assert preset("default").turns
    assert not preset("default", turns=False).turns
    assert not preset("default", distortion="turn").turns
    with pytest.raises(GlanceError, match="turns: expected none with the distortion 'turn'"):
        preset("default", distortion="turn", turns=True)


def test_changes_that_are_none_change_nothing() -> None:
    assert preset("quick", steps=None, seed=None) == PRESETS["quick"]
    changed = preset("quick", steps=7, fine_tune_steps=0)
    assert changed.steps == 7
    assert changed.batch_size == PRESETS["quick"].batch_size


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lambda_s": 1.5}, "lambda_s"),
        ({"lambda_s": float("nan")}, "lambda_s"),
        ({"steps": 0}, "steps"),
        ({"fine_tune_steps": -1}, "steps"),
        ({"batch_size": 0}, "batch size"),
        ({"fine_tune_batch_size": 1}, "batch size"),
        ({"precision": "float16"}, "precision: expected one of float32, bfloat16, got 'float16'"),
        ({"local_net": "wide"}, "local net: expected one of fine, deep, got 'wide'"),
        ({"memory_of": "image"}, "memory of: expected one of context, teacher, local, got 'image'"),
        ({"stain_uses": 0}, "stain uses: expected at least 1, got 0"),
        ({"holes_per_image": 0}, "holes per image: expected at least 1, got 0"),
        (
            {"positions": "paper!"},
            "positions: expected 'uniform' or a grid; grid: expected 'paper'",
        ),
        ({"aggregation": "median"}, "aggregation: expected one of mean, gaussian, max, idw"),
        ({"stains": "huge"}, "stains: expected one of small, wide, got 'huge'"),
        ({"grid": "99"}, "grid: expected 'paper' or a stride"),
        ({"distortion": "scratch"}, "distortion: expected one of stain, turn, got 'scratch'"),
        ({"head_steps": -1}, "head steps: expected at least 0, got -1"),
        ({"pieces": -1}, "pieces: expected at least 0, got -1"),
        ({"memory_size": -1}, "memory size: expected at least 0, got -1"),
        ({"memory_drawn": 1.5}, "memory drawn: expected a share between 0 and 1, got 1.5"),
        ({"memory_share": 1.5}, "memory share: expected a share between 0 and 1, got 1.5"),
        (
            {"standardise": False, "surprisal": False},
            "memory size: expected 0 with a raw mix of scores",
        ),
        (
            {"standardise": False, "memory_size": 0},
            "surprisal: expected none with a raw mix of scores",
        ),
        ({"whiten_over": "row"}, "whiten over: expected one of patch, image, got 'row'"),
    ],
)
def test_values_that_mean_nothing_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(GlanceError, match=named):
        TrainSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"learning_rate": float("nan")},
     {"learning_rate": float("inf")}],
)  # fmt: skip
def test_distillation_refuses_values_that_mean_nothing(changes: dict[str, object]) -> None:
    with pytest.raises(GlanceError, match="expected"):
        DistillSettings(**changes)  # type: ignore[arg-type]


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(GlanceError, match="expected one of quick, default, paper, got 'fast'"):
        preset("fast")
