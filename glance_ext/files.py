"""Writing results whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from glance_ext.errors import OutputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path`` and renames it to ``path`` when the block ends well.

    Whatever goes wrong inside the block, an interruption included, the temporary file is removed
    and an older file at ``path`` stays as it was.

    Args:
        path: Where the result belongs. Its folder is created if missing.
        mode: ``"wb"`` or ``"w"`` (UTF-8, no newline translation).

    Raises:
        OutputError: The operating system refused (disk full, no permission, a file where a folder
            is needed); the message names ``path``.
    """
    target = Path(path)
    text = {"encoding": "utf-8", "newline": ""} if "b" not in mode else {}
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
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
        raise OutputError(f"{target}: cannot write the file: {reason}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON with :func:`atomic_write`; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_write(path, "w") as stream:
        stream.write(text)
