"""Losses go to TensorBoard where it is installed, and nowhere where it is not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from glance_ext.engine.loop import Stage, Trainer


class _Writer:
    """Stands in for SummaryWriter and keeps what it is told."""

    made: ClassVar[list[_Writer]] = []

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        _Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def _train(folder: Path, log_dir: Path | None) -> None:
    module = nn.Linear(2, 1)

    def step(generator: torch.Generator) -> dict[str, Any]:
        return {"loss": module(torch.ones(1, 2, dtype=torch.float32)).square().mean()}

    optimizer = torch.optim.Adam(module.parameters())
    trainer = Trainer(folder / "state.safetensors", {}, log_dir=log_dir, show_progress=False)
    trainer.run(Stage("joint", 25, step, optimizer, {"module": module}))


def test_losses_reach_tensorboard_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = _Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr(_Writer, "made", [])
    _train(tmp_path, tmp_path / "logs")
    (writer,) = _Writer.made
    assert writer.folder == str(tmp_path / "logs")
    assert [(name, step) for name, _, step in writer.scalars] == [
        ("joint/loss", 0),
        ("joint/loss", 20),
        ("joint/loss", 24),
    ]
    assert writer.scalars[-1][1] < writer.scalars[0][1]
    assert writer.closed


def test_training_needs_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _train(tmp_path, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
