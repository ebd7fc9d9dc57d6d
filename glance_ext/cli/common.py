"""What the commands share: options, errors, exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from glance_ext.errors import (
    GlanceError,
    InputError,
    Interrupted,
    NoUsableInputError,
    OutputError,
)

# torch is imported where it is needed: --help answers at once, and Ctrl-C finds main() running.
if TYPE_CHECKING:
    import torch

SOME_FAILED = 1
WRONG_CALL = 2
INTERRUPTED = 130

PATH = click.Path(path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class GlanceGroup(click.Group):
    """Answers every mistake that a user can make with one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command line; see :meth:`click.Command.main`."""
        run: Callable[..., Any] = super().main  # click's overloads do not know *args
        if not kwargs.pop("standalone_mode", True):
            return run(*args, standalone_mode=False, **kwargs)
        warnings.filterwarnings("default", category=RuntimeWarning, module="glance_ext")
        if hasattr(sys.stdout, "reconfigure"):  # names of files that the terminal cannot encode
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with _signals_interrupt():
                result = run(*args, standalone_mode=False, **kwargs)
        except click.exceptions.Exit as request:
            sys.exit(request.exit_code)
        except (click.Abort, KeyboardInterrupt):
            say_error("interrupted; files that were already written are whole")
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except GlanceError as error:
            say_error(str(error))
            sys.exit(exit_code_of(error))
        except BrokenPipeError:
            _give_up_stdout()
            sys.exit(SOME_FAILED)
        except OSError as error:  # the system's refusal: a full disk behind standard output, ...
            _give_up_stdout()
            say_error(str(error))
            sys.exit(SOME_FAILED)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            say_error(" ".join(["out of memory", *str(error).splitlines()[:1]]))
            sys.exit(SOME_FAILED)
        sys.exit(result if isinstance(result, int) else 0)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Lets SIGTERM clean up as Ctrl-C does, whatever else the interrupted code makes of it.

    numpy and others, stopped in the middle of being imported, answer with errors of their own; and
    what is raised inside a callback, such as the import system's, Python drops: a dropped interrupt
    is raised again a moment later.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            report(dropped)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    report, sys.unraisablehook = sys.unraisablehook, again
    previous = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        if signal.getsignal(number) is not signal.SIG_IGN  # as nohup wants it
    }
    try:
        yield
    except Exception as error:
        if received and not isinstance(error, GlanceError):
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = report
        for number, handler in previous.items():
            signal.signal(number, handler)


def _give_up_stdout() -> None:
    """Keeps Python from failing once more when it flushes standard output at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU
        or "can't allocate memory" in str(error)  # torch's, of the CPU
    )


def exit_code_of(error: GlanceError) -> int:
    """The exit code that belongs to an error which ended the command."""
    if isinstance(error, Interrupted):
        return INTERRUPTED
    return SOME_FAILED if isinstance(error, OutputError | NoUsableInputError) else WRONG_CALL


def say(text: str) -> None:
    """Prints to standard output."""
    click.echo(text)


def say_error(text: str) -> None:
    """Prints one message to standard error."""
    from glance_ext.report.text import printable

    click.echo(f"glance-ext: {printable(text)}", err=True)


class Failures:
    """Inputs that could not be used: reported as they come, counted when the block ends."""

    def __init__(self) -> None:
        self.errors: list[InputError] = []

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.errors and (kind is None or issubclass(kind, Exception)):
            files = "file" if len(self.errors) == 1 else "files"
            say_error(f"{len(self.errors)} {files} could not be used (named above)")

    def __call__(self, error: InputError) -> None:
        """Reports one."""
        self.errors.append(error)
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            say_error(str(error))

    def exit_code(self) -> int:
        """0, or 1 if an input failed."""
        return SOME_FAILED if self.errors else 0


def no_images(given: Sequence[Path]) -> click.UsageError:
    """The error of a call whose folders hold no image."""
    return click.UsageError(
        f"expected images in {', '.join(map(str, given))}, but found none (PNG, JPEG, BMP, TIFF)"
    )


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--device``: cpu, cuda, cuda:N, or auto."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=_parse_device,
        help="Where to compute: cpu, cuda, cuda:1, ... or auto (cuda if there is one).",
    )(command)


def _parse_device(context: click.Context, option: click.Parameter, value: str) -> torch.device:
    import torch

    if value == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"expected auto, cpu, cuda or cuda:N, got {value!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise click.BadParameter("no CUDA device can be used here; glance-ext doctor says more")
        if (device.index or 0) >= torch.cuda.device_count():
            raise click.BadParameter(
                f"expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, got {value!r}"
            )
    return device


def seed_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--seed``."""
    return click.option(
        "--seed",
        type=click.IntRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        callback=_set_seed,
        help="Of everything random; the same seed gives the same result on a CPU.",
    )(command)


def _set_seed(context: click.Context, option: click.Parameter, value: int) -> int:
    import torch

    torch.manual_seed(value)
    return value


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``."""
    return click.option(
        "--json", "json_file", type=PATH, help="Also write the figures to this file, as JSON."
    )(command)


def metadata() -> dict[str, Any]:
    """What a result file says of the software that made it."""
    import platform

    import torch

    from glance_ext import __version__

    return {
        "glance_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
