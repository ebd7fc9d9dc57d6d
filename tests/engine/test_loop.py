import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glance_ext.engine import loop
from glance_ext.engine.loop import Stage, Trainer, step_generator
from glance_ext.errors import CheckpointError, GlanceError, Interrupted, OutputError

Hook = Callable[[int], None]


def stage(name: str = "fit", steps: int = 9, hook: Hook = lambda step: None) -> Stage:
    """Fits a small network to random numbers; ``hook`` is called with the number of each call."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    calls = [0]

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        hook(calls[0])
        calls[0] += 1
        x = torch.randn((16, 4), generator=generator)
        loss = (net(x)[:, 0] - x.sum(1).sin()).square().mean()
        return {"loss": loss, "double": 2 * loss}

    return Stage(name, steps, step, torch.optim.Adam(net.parameters(), lr=0.01), {"net": net})


def ctrl_c_at(*steps: int) -> Hook:
    def hook(step: int) -> None:
        if step in steps:
            os.kill(os.getpid(), signal.SIGINT)

    return hook


def trainer(folder: Path, **options: object) -> Trainer:
    settings = {"lr": 0.01, "grid": "8", "share": 0.1}
    return Trainer(folder / "state", settings, show_progress=False, **options)  # type: ignore[arg-type]


def weights(stage: Stage) -> bytes:
    return b"".join(t.numpy().tobytes() for t in stage.modules["net"].state_dict().values())


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    whole = stage()
    (tmp_path / "whole").mkdir()
    trainer(tmp_path / "whole").run(whole)
    return weights(whole)


# ---------------------------------------------------------------- steps


def test_a_generator_depends_on_seed_stage_and_step_alone() -> None:
    def draw(*key: object) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=step_generator(*key)).tolist())  # type: ignore[arg-type]

    keys = [(seed, name, step) for seed in (0, 1, 2**31 - 1) for name in ("joint", "finetune")
            for step in (0, 1, 199_999)]  # fmt: skip
    assert len({draw(*key) for key in keys}) == len(keys)
    torch.manual_seed(3)
    assert draw(0, "joint", 5) == draw(0, "joint", 5)


def test_steps_are_taken_and_the_loss_falls(tmp_path: Path) -> None:
    fit, run = stage(steps=200), trainer(tmp_path)
    run.run(fit)
    points = run.history["fit/loss"]
    assert [step for step, _ in points] == [*range(0, 200, 20), 199]
    assert points[-1][1] < 0.7 * points[0][1]
    assert [v for _, v in run.history["fit/double"]] == [2 * v for _, v in points]


def test_the_learning_rate_is_that_of_the_step(tmp_path: Path) -> None:
    seen: list[float] = []
    fit = stage(hook=lambda _: seen.append(fit.optimizer.param_groups[0]["lr"]))
    fit.learning_rate = lambda step: 0.5 / (step + 1)
    trainer(tmp_path).run(fit)
    assert seen == [0.5 / (step + 1) for step in range(9)]


def test_the_same_seed_trains_the_same_network_and_another_another(
    tmp_path: Path, expected: bytes
) -> None:
    results = []
    for seed in (0, 7):
        again = stage()
        trainer(tmp_path, seed=seed).run(again)
        results.append(weights(again))
    assert results[0] == expected
    assert results[1] != expected


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("at", [0, 3, 7, 8])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, expected: bytes, at: int) -> None:
    message = f"stopped after step {at + 1} of 9 of stage 'fit'; the state is in .*--resume"
    with pytest.raises(Interrupted, match=message):
        trainer(tmp_path).run(stage(hook=ctrl_c_at(at)))
    taken: list[int] = []
    again, run = stage(hook=taken.append), trainer(tmp_path)
    assert run.resume()
    run.run(again)
    run.restore_modules(again.modules)
    assert len(taken) == 8 - at
    assert weights(again) == expected


def test_a_run_may_be_interrupted_again_and_again(tmp_path: Path, expected: bytes) -> None:
    for _ in range(4):
        run = trainer(tmp_path)
        run.resume()
        with pytest.raises(Interrupted):
            run.run(stage(hook=ctrl_c_at(1)))
    last, run = stage(), trainer(tmp_path)
    run.resume()
    run.run(last)
    assert weights(last) == expected


def test_sigterm_saves_as_ctrl_c_does(tmp_path: Path, expected: bytes) -> None:
    def hook(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        trainer(tmp_path).run(stage(hook=hook))
    again, run = stage(), trainer(tmp_path)
    run.resume()
    run.run(again)
    assert weights(again) == expected


def test_a_second_ctrl_c_stops_at_once_and_leaves_a_whole_state(
    tmp_path: Path, expected: bytes
) -> None:
    def hook(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, save_every=2).run(stage(hook=hook))
    taken: list[int] = []
    again, run = stage(hook=taken.append), trainer(tmp_path)
    assert run.resume()
    run.run(again)
    assert len(taken) == 9 - 6
    assert weights(again) == expected


def test_ctrl_c_while_the_last_state_is_saved_is_not_lost(
    tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.save_checkpoint

    def save(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "save_checkpoint", save)
    fit = stage()
    with pytest.raises(Interrupted, match="after step 9 of 9"):
        trainer(tmp_path).run(fit)
    assert weights(fit) == expected


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer(tmp_path).run(stage())
    with pytest.raises(Interrupted):
        trainer(tmp_path).run(stage(hook=ctrl_c_at(2)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_signals_that_are_ignored_stay_so(tmp_path: Path, expected: bytes) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a background shell do
    try:
        fit = stage(hook=ctrl_c_at(2))
        trainer(tmp_path).run(fit)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert weights(fit) == expected


def test_a_killed_run_goes_on_from_its_last_periodic_state(tmp_path: Path, expected: bytes) -> None:
    def hook(step: int) -> None:
        if step == 5:
            raise MemoryError  # as good as a kill: nothing is saved on the way out

    with pytest.raises(MemoryError):
        trainer(tmp_path, save_every=2).run(stage(hook=hook))
    taken: list[int] = []
    again, run = stage(hook=taken.append), trainer(tmp_path)
    run.resume()
    run.run(again)
    assert len(taken) == 9 - 4
    assert weights(again) == expected


def test_nothing_to_resume_is_a_new_run(tmp_path: Path, expected: bytes) -> None:
    fit, run = stage(), trainer(tmp_path)
    assert not run.resume()
    run.run(fit)
    assert weights(fit) == expected


def test_history_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run(stage(steps=50))
    with pytest.raises(Interrupted):
        trainer(tmp_path).run(stage(steps=50, hook=ctrl_c_at(29)))
    run = trainer(tmp_path)
    run.resume()
    run.run(stage(steps=50))
    assert run.history == whole.history


def two_stages(run: Trainer, hooks: tuple[Hook, Hook]) -> bytes:
    first = stage("first", 5, hooks[0])
    second = stage("second", 5, hooks[1])
    run.run(first)
    run.restore_modules({"net": first.modules["net"]})
    second.modules["net"].load_state_dict(first.modules["net"].state_dict())
    run.run(second)
    return weights(second)


@pytest.mark.parametrize("at", [(2, None), (4, None), (None, 0), (None, 3), (None, 4)])
def test_two_stages_resume_in_the_middle_of_either(
    tmp_path: Path, at: tuple[int | None, int | None]
) -> None:
    none: Hook = ctrl_c_at()
    whole = two_stages(trainer(tmp_path / "whole"), (none, none))
    hooks = tuple(none if step is None else ctrl_c_at(step) for step in at)
    with pytest.raises(Interrupted):
        two_stages(trainer(tmp_path), hooks)  # type: ignore[arg-type]
    taken: tuple[list[int], list[int]] = ([], [])
    run = trainer(tmp_path)
    assert run.resume()
    assert two_stages(run, (taken[0].append, taken[1].append)) == whole or at[1] == 4
    first, second = at
    assert len(taken[0]) == (0 if first is None else 4 - first)
    assert len(taken[1]) == (5 if second is None else 4 - second)


# ---------------------------------------------------------------- what is refused


def test_other_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer(tmp_path).run(stage(hook=ctrl_c_at(3)))
    for other, named in (
        ({"lr": 0.01, "grid": "4", "share": 0.1}, "grid = '8', got '4'"),
        ({"lr": 0.01, "grid": "8"}, "share = 0.1, got None"),
        ({"lr": 0.01, "grid": "8", "share": 0.1, "new": 1}, "new = None, got 1"),
    ):
        run = Trainer(tmp_path / "state", other, show_progress=False)
        with pytest.raises(CheckpointError, match=f"state: cannot resume: .*{named}"):
            run.resume()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer(tmp_path).run(stage(hook=ctrl_c_at(3)))
    state = tmp_path / "state"
    state.write_bytes(state.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cut short"):
        trainer(tmp_path).resume()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 5, 30])
def test_a_loss_that_is_no_number_ends_training_and_is_never_saved(
    tmp_path: Path, value: float, at: int
) -> None:
    fit = stage(steps=31)
    real, calls = fit.step, [0]

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        losses = real(generator)
        calls[0] += 1
        return {"loss": losses["loss"] * (value if calls[0] > at else 1)}

    fit.step = step
    with pytest.raises(GlanceError, match=r"diverged: loss is (nan|inf) at step .* 'fit'; try a"):
        trainer(tmp_path, save_every=4).run(fit)
    run = trainer(tmp_path)
    if run.resume():
        again = stage()
        run.restore_modules(again.modules)
        assert all(torch.isfinite(p).all() for p in again.modules["net"].parameters())


def test_ctrl_c_does_not_save_what_has_diverged(tmp_path: Path) -> None:
    fit = stage(hook=ctrl_c_at(4))
    real = fit.step

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": real(generator)["loss"] * math.nan}

    fit.step = step
    run = trainer(tmp_path)
    run._log = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(GlanceError, match="diverged: loss is nan at step 4"):
        run.run(fit)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="state: cannot write the file: No space left"):
        trainer(tmp_path).run(stage())
    assert os.listdir(tmp_path) == []
