"""A call in a process of its own, as a script that does only this would make it.

What a call costs on a CPU depends on what its process did before: glibc hands a large freed block
back to the system, unless larger ones have been freed earlier, and every page of the next block
then faults anew. A suite that has computed in float64 before leaves an allocator that a script
never has.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor

from glance_ext.errors import GlanceError


class Alone:
    """``prepare(*arguments)``, once, and then what it gave, at each call, in another process.

    The process starts with the first call and ends with this object.

    Args:
        prepare: A function of a module, which gives a function without arguments.
        arguments: Anything that can be pickled.
    """

    def __init__(self, prepare: Callable[..., Callable[[], Tensor]], *arguments: Any) -> None:
        self._start = (prepare, arguments, torch.get_num_threads())
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> Tensor:
        """Calls it there.

        Returns:
            A copy of its result.

        Raises:
            GlanceError: The process has ended.
        """
        process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _write(process.stdin, "call")
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise GlanceError(
                f"{self._start[0].__name__}: the process that runs it alone has ended with "
                f"{process.wait()}"
            ) from error

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        self._process = process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        _write(process.stdin, self._start)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _write(stream: IO[bytes], value: Any) -> None:
    pickle.dump(value, stream)
    stream.flush()


def serve() -> None:
    """What the other process does: prepares, then calls as often as it is asked to."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    prepare, arguments, threads = pickle.load(requests)
    torch.set_num_threads(threads)
    call = prepare(*arguments)
    while True:
        try:
            pickle.load(requests)
        except EOFError:
            return
        _write(answers, call())
