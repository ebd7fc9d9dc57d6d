"""Ctrl-C at any moment, in a process of its own."""

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glance_ext.cli.common import _signals_interrupt
from tests.cli.conftest import write_image

Start = Callable[..., "subprocess.Popen[str]"]


def wait_for(child: "subprocess.Popen[str]", pattern: str, seconds: float = 120) -> str:
    """Reads standard error until ``pattern`` shows."""
    assert child.stderr is not None
    seen, end = "", time.monotonic() + seconds
    descriptor = child.stderr.fileno()
    while not re.search(pattern, seen):
        assert time.monotonic() < end, seen
        ready, _, _ = select.select([descriptor], [], [], 1)
        if ready:
            data = os.read(descriptor, 4096).decode(errors="replace")
            assert data, f"ended before {pattern!r}: {seen}"
            seen += data
    return seen


def stop(child: "subprocess.Popen[str]", number: int, seen: str = "") -> str:
    child.send_signal(number)
    errors = seen + child.communicate(timeout=120)[1]
    assert "Traceback" not in errors, errors
    assert "Exception ignored" not in errors, errors
    return errors


def unfinished(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


def test_an_interrupted_training_goes_on_to_the_same_model(
    process: Start,
    good: Path,
    local_net: Path,
    tmp_path: Path,
) -> None:
    def arguments(output: Path) -> list[object]:
        return ["train", "--normal", good, "-o", output, "--steps", 60, "--batch-size", 2,
                "--head-steps", 20, "--context-steps", 20, "--no-turns", "--memory-size", 50,
                "--grid", 33, "--local-net", local_net]  # fmt: skip

    child = process(*arguments(tmp_path / "parts"))
    seen = wait_for(child, r"joint: .* [1-9]\d*/60 ")
    errors = stop(child, signal.SIGINT, seen)
    assert child.returncode == 130
    assert "stopped after step" in errors
    assert "go on with --resume" in errors
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["training.safetensors"]
    for output, option in (("parts", ["--resume"]), ("whole", [])):
        # both in processes alike: another number of threads would add up in another order
        child = process(*arguments(tmp_path / output), *option)
        errors = child.communicate(timeout=300)[1]
        assert child.returncode == 0, errors
    whole, parts = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_detection_leaves_whole_files(
    process: Start, model: Path, tmp_path: Path, number: int
) -> None:
    for i in range(60):
        write_image(tmp_path / "in" / f"{i:02}.png", i)
    child = process("detect", model, tmp_path / "in", "-o", tmp_path / "out", "--grid", 16)
    seen = wait_for(child, r" ([2-9]|\d\d)/60 ")
    errors = stop(child, number, seen)
    assert child.returncode == 130
    assert "interrupted; files that were already written are whole" in errors
    assert not unfinished(tmp_path)
    maps = list((tmp_path / "out" / "maps").iterdir())
    assert 2 <= len(maps) < 60
    assert all(np.load(path).shape == (64, 64) for path in maps)
    assert not (tmp_path / "out" / "scores.csv").exists()


SLOW = """
import sys, time
print("importing", file=sys.stderr, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise {error}
"""


@pytest.mark.parametrize(
    ("package", "error", "code"),
    [
        ("click", "", -signal.SIGINT),  # before the command line is there: a shell says 130 too
        ("torch", "", 130),
        ("tifffile", "ImportError('stopped half-way')", 130),  # as libraries do
    ],
)
def test_ctrl_c_while_it_starts_is_quiet(
    process: Start,
    tmp_path: Path,
    package: str,
    error: str,
    code: int,
) -> None:
    (tmp_path / f"{package}.py").write_text(SLOW.format(error=error))
    child = process("detect", "model", "image", "-o", tmp_path / "out", path=tmp_path)
    seen = wait_for(child, "importing")
    errors = stop(child, signal.SIGINT, seen)
    assert child.returncode == code, errors
    assert ("interrupted" in errors) == (code == 130)


def test_a_reader_that_leaves_early_is_no_error(process: Start) -> None:
    read, write = os.pipe()
    os.close(read)
    child = process("--help", stdout=write)
    os.close(write)
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 1
    assert errors == ""


def test_a_terminal_of_few_letters_shows_what_it_can(
    process: Start, model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    child = process("detect", model, good / "0.png", "-o", tmp_path / "found 猫")
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert r"found \u732b" in output


def test_an_interrupt_that_python_drops_is_raised_again() -> None:
    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)  # the signal's exception comes here, where Python ignores it

    def work() -> None:
        Dropping()
        time.sleep(5)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), _signals_interrupt():
            work()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 4
