import importlib
import os
import re
import signal

import click
import pytest
import torch

from glance_ext import __version__
from glance_ext.cli import _COMMANDS, main
from tests.cli.conftest import Run

COMPUTES = ("bench", "demo", "detect", "distill", "evaluate", "train")


def command(name: str) -> click.Command:
    return importlib.import_module(f"glance_ext.cli.{name}").command


def flat(text: str) -> str:
    """Text without the line breaks of a help page, which may also fall after a hyphen."""
    return re.sub(r"\s+", " ", re.sub(r"-\n\s+", "-", text))


def test_help_names_every_command_and_exit_code(run: Run) -> None:
    for option in ("--help", "-h"):
        result = run(option)
        assert result.exit_code == 0
        for name, summary in _COMMANDS.items():
            assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE)
            assert flat(summary) in flat(result.stdout)
        for code in ("0 all well", "1 some inputs failed", "2 the call was wrong", "130"):
            assert code in flat(result.stdout)


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_help_of_a_command_explains_each_option(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    text = flat(result.stdout)
    for parameter in command(name).params:
        if isinstance(parameter, click.Option):
            for option in parameter.opts:
                assert option in text, option
            if parameter.name not in ("steps", "batch_size", "learning_rate", "dtype"):
                assert parameter.help, f"{name} {parameter.opts[0]} says nothing of itself"
                assert flat(parameter.help) in text
        else:
            assert parameter.human_readable_name in text


@pytest.mark.parametrize("name", COMPUTES)
def test_what_computes_has_a_seed_a_device_and_figures(name: str) -> None:
    options = {option for parameter in command(name).params for option in parameter.opts}
    assert {"--seed", "--device", "--json"} <= options


def test_the_version_is_the_packages(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert __version__ in result.stdout
    assert "glance-ext" in result.stdout


def test_an_unknown_command_or_option_is_a_wrong_call(run: Run) -> None:
    for arguments in (["fly"], ["train", "--wings"], ["detect"], ["--wings"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Error: " in result.stderr
    assert run().exit_code in (0, 2)  # click's own help


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", "meta", "", "cpu:0:0"])
def test_a_device_that_is_none_is_named(run: Run, device: str) -> None:
    result = run("detect", "model", "image", "-o", "out", "--device", device)
    assert result.exit_code == 2
    assert "expected auto, cpu, cuda or cuda:N" in flat(result.stderr)


def test_cuda_where_there_is_none_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("detect", "model", "image", "-o", "out", "--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA device can be used here; glance-ext doctor says more" in flat(result.stderr)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = run("detect", "model", "image", "-o", "out", "--device", "cuda:2")
    assert result.exit_code == 2
    assert "expected cuda:0 to cuda:1, got 'cuda:2'" in flat(result.stderr)


def test_an_unknown_suite_is_named(run: Run) -> None:
    result = run("bench", "everything")
    assert result.exit_code == 2
    assert "everything" in result.stderr
    assert "partial_conv" in result.stderr or "ops" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 1, "out of memory CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (OSError(28, "No space left on device", "/tmp/x"), 1, "No space left on device: '/tmp/x'"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_what_the_system_refuses_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    from glance_ext import doctor

    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    result = run("doctor")
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_what_a_library_makes_of_ctrl_c_is_an_interruption(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glance_ext import doctor

    def fail() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy: stopped half-way") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(doctor, "examine", fail)
    result = run("doctor")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from glance_ext import doctor

    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(doctor, "examine", fail)
    assert isinstance(CliRunner().invoke(main, ["doctor"]).exception, RuntimeError)
