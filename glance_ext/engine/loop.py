"""The training loop that all stages share: progress, logging, checkpoints, interruption, resume.

A step draws everything random from :func:`step_generator`, which depends on seed, stage and step
alone. Resuming therefore needs no random state: weights, optimizer and step number are enough to
end with the same bits as an uninterrupted run.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from glance_ext.engine.checkpoint import load_checkpoint, load_module, prefixed, save_checkpoint
from glance_ext.engine.distributed import World
from glance_ext.errors import CheckpointError, GlanceError, Interrupted, OutputError

CHECKPOINT_KIND = "training"
_LOG_EVERY = 20

History = dict[str, list[tuple[int, float]]]


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """A CPU generator for one training step, the same whenever and wherever the step is run."""
    mixed = int.from_bytes(stage.encode()[:8].ljust(8, b"\0"), "little")
    value = (seed * 0x9E3779B97F4A7C15 + mixed * 0xBF58476D1CE4E5B9 + step) % 2**63
    generator = torch.Generator().manual_seed(value)
    torch.randint(2, (16,), generator=generator)  # neighbouring seeds start alike; move on
    return generator


class Step(Protocol):
    """One step of a stage: computes the losses of a batch; the loop does the rest."""

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns named scalar losses; the one called ``"loss"`` is minimised."""


@dataclass
class Stage:
    """One stage of training.

    Attributes:
        name: Names the stage in checkpoints, logs and progress bars.
        steps: How many steps the stage takes.
        step: Computes the losses.
        optimizer: Steps the parameters.
        modules: What a checkpoint must hold to go on, by name.
        replicated: Whether each of several processes computes the whole losses. If not, each
            computes its share, and the losses are the sums of these.
    """

    name: str
    steps: int
    step: Step
    optimizer: torch.optim.Optimizer
    modules: dict[str, nn.Module]
    replicated: bool = True
    learning_rate: Callable[[int], float] | None = None


@dataclass
class Trainer:
    """Runs stages one after the other.

    Args:
        checkpoint: Where to save the state of training, for resuming.
        settings: What must be equal for a resumed run to be the same run.
        seed: Of everything random.
        save_every: Steps between checkpoints; one is also written at Ctrl-C and at a stage's end.
        log_dir: A folder for TensorBoard, used if the package is installed.
        show_progress: Whether to draw progress bars on standard error.
        world: The processes that train together. The first one alone draws, logs, reads and writes.
    """

    checkpoint: Path
    settings: dict[str, Any]
    seed: int = 0
    save_every: int = 250
    log_dir: Path | None = None
    show_progress: bool = True
    world: World = field(default_factory=World)
    history: History = field(default_factory=dict)
    _resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    _interrupted: bool = False

    def resume(self) -> bool:
        """Reads the checkpoint if there is one; returns whether there was.

        Raises:
            CheckpointError: It is damaged, or belongs to a run with other settings.
        """
        loaded = self.world.on_first(self._load)
        if loaded is None:
            return False
        tensors, metadata = loaded
        self.history = {
            key: [(int(s), float(v)) for s, v in points]
            for key, points in metadata["history"].items()
        }
        self._resumed = (tensors, metadata)
        return True

    def _load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.checkpoint.exists():
            return None
        tensors, metadata = load_checkpoint(self.checkpoint, CHECKPOINT_KIND)
        theirs = metadata["settings"]
        for key in sorted({*theirs, *self.settings}):
            if theirs.get(key) != self.settings.get(key):
                raise CheckpointError(
                    f"{self.checkpoint}: cannot resume: expected the settings of the interrupted "
                    f"run, {key} = {theirs.get(key)!r}, got {self.settings.get(key)!r}"
                )
        return tensors, metadata

    def run(self, stage: Stage) -> None:
        """Trains one stage to its end, or goes on where the checkpoint stopped.

        Raises:
            Interrupted: After Ctrl-C or SIGTERM; the checkpoint has been written.
            GlanceError: A loss is not finite.
        """
        start = self._restore(stage)
        if start is None or start >= stage.steps:
            return
        self.world.start_alike(stage.modules.values())
        last_saved = start
        with (
            self._catch_signals(),
            _tensorboard(self.log_dir if self.world.is_first else None) as writer,
            tqdm(
                total=stage.steps,
                initial=start,
                desc=stage.name,
                unit="step",
                disable=not (self.show_progress and self.world.is_first),
                dynamic_ncols=True,
            ) as bar,
        ):
            for step in range(start, stage.steps):
                if stage.learning_rate is not None:
                    for group in stage.optimizer.param_groups:
                        group["lr"] = stage.learning_rate(step)
                stage.optimizer.zero_grad(set_to_none=True)
                losses = stage.step(step_generator(self.seed, stage.name, step))
                losses["loss"].backward()
                losses, stop = self.world.add_up(
                    stage.optimizer, losses, self._interrupted, replicated=stage.replicated
                )
                stage.optimizer.step()
                done = step + 1
                if step % _LOG_EVERY == 0 or done == stage.steps:
                    self._log(stage.name, step, losses, bar, writer)
                bar.update()
                if stop or (self.world.size == 1 and self._interrupted):
                    break
                if done - last_saved >= self.save_every and done < stage.steps:
                    _finite(stage.name, step, losses)
                    self._save(stage, done)
                    last_saved = done
            _finite(stage.name, step, losses)
            self._save(stage, done)
            stop = self.world.any(self._interrupted or stop)
        if stop or self._interrupted:  # also if it came while the last steps were saved
            raise Interrupted(
                f"stopped after step {done} of {stage.steps} of stage '{stage.name}'; the state "
                f"is in {self.checkpoint}; go on with --resume"
            )

    def _restore(self, stage: Stage) -> int | None:
        """The step to go on from; None if the checkpoint is of a later stage."""
        if self._resumed is None:
            return 0
        tensors, metadata = self._resumed
        if stage.name in metadata["finished"]:
            return None
        if metadata["stage"] != stage.name:
            return 0
        for name, module in stage.modules.items():
            load_module(module, tensors, name, self.checkpoint)
        _load_optimizer(stage.optimizer, tensors, metadata["optimizer"])
        return int(metadata["step"])

    def restore_modules(self, modules: dict[str, nn.Module]) -> None:
        """Loads into ``modules`` what the resumed checkpoint holds of them."""
        if self._resumed is not None:
            tensors = self._resumed[0]
            for name, module in modules.items():
                if any(key.startswith(name + ".") for key in tensors):
                    load_module(module, tensors, name, self.checkpoint)

    def _save(self, stage: Stage, step: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, module in stage.modules.items():
            tensors.update(prefixed(module, name))
        optimizer_tensors, optimizer_state = _dump_optimizer(stage.optimizer)
        tensors.update(optimizer_tensors)
        finished = list(self._resumed[1]["finished"]) if self._resumed else []
        if step >= stage.steps:
            finished.append(stage.name)
        metadata = {
            "stage": stage.name,
            "step": step,
            "finished": finished,
            "optimizer": optimizer_state,
            "settings": self.settings,
            "history": self.history,
        }
        if self.world.is_first:
            save_checkpoint(self.checkpoint, CHECKPOINT_KIND, tensors, metadata)
        if step >= stage.steps:
            self._resumed = (tensors, metadata)

    def _log(
        self, stage: str, step: int, losses: dict[str, Tensor], bar: tqdm, writer: Any
    ) -> None:
        values = _finite(stage, step, losses)
        for name, value in values.items():
            self.history.setdefault(f"{stage}/{name}", []).append((step, value))
            if writer is not None:
                writer.add_scalar(f"{stage}/{name}", value, step)
        bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Turns Ctrl-C and SIGTERM into a stop after the step; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        self._interrupted = False
        previous = {
            number: signal.signal(number, stop)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN  # as nohup wants it
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _finite(stage: str, step: int, losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses as numbers; what has diverged is neither logged nor saved."""
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise GlanceError(
                f"training diverged: {name} is {value} at step {step} of stage '{stage}'; "
                "try a smaller learning rate"
            )
    return values


def _dump_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    tensors = {
        f"optimizer.{index}.{name}": value
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return tensors, {"parameters": len(state)}


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], summary: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    if len(state) != summary["parameters"]:
        raise CheckpointError("the optimizer's state in the checkpoint is incomplete")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextmanager
def _tensorboard(log_dir: Path | None) -> Iterator[Any]:
    """A writer for TensorBoard, or None where there is no folder or no such package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log_dir = None
    if log_dir is None:
        yield None
        return
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        with closing(SummaryWriter(str(log_dir))) as writer:
            yield writer
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{log_dir}: cannot write TensorBoard's logs: {reason}") from error
