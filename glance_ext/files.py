"""Writing results whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from glance_ext.errors import OutputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    r"""Opens a temporary file beside ``path`` and renames it to ``path`` when the block ends well.

    Whatever goes wrong inside the block, an interruption included, the temporary file is removed
    and an older file at ``path`` stays as it was. A link is followed. A device or a pipe, such as
    ``/dev/stdout``, is written to as it stands: replacing it would take it from everybody else.

    Args:
        path: Where the result belongs. Its folder is created if missing.
        mode: ``"wb"`` or ``"w"`` (UTF-8, no newline translation; the bytes of a file name that are
            no UTF-8 are spelled out, ``\udcff``, which JSON reads back).

    Raises:
        OutputError: The operating system refused (disk full, no permission, a file where a folder
            is needed); the message names ``path``.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    temporary = None
    try:
        if _is_special(path):
            with open(path, mode, **text) as stream:  # type: ignore[call-overload]
                yield stream
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: the target's, made longer, could be too long
        descriptor, temporary = tempfile.mkstemp(prefix=".glance-", dir=target.parent)
        with os.fdopen(descriptor, mode, **text) as stream:  # type: ignore[call-overload]
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{os.fspath(path)}: cannot write the file: {reason}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def ensure_folder(path: str | os.PathLike[str]) -> None:
    """Creates a folder for results and tries it, before hours are spent on what belongs there.

    Raises:
        OutputError: It cannot be created, or no file can be created in it.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{os.fspath(path)}: cannot write to this folder: {reason}") from error


def _is_special(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a device, a pipe or a socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # most often: not there yet
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON with :func:`atomic_write`; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_write(path, "w") as stream:
        stream.write(text)
