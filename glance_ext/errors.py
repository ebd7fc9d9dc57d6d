"""What a user's mistake or a broken input looks like: one family of exceptions.

Everything that the command line should answer with one line instead of a traceback derives from
:class:`GlanceError`. A message names the thing, what was expected, and what came.
"""

from __future__ import annotations

from os import PathLike

TOO_LARGE = "expected an image that fits in memory, ran out of it"


class GlanceError(Exception):
    """A mistake that the caller can mend; the command line prints it without a traceback."""


class InputError(GlanceError):
    """One input file cannot be used; a run over many reports it and goes on.

    Attributes:
        path: The file that cannot be used.
        reason: Why, without the path.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = str(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")


class NoUsableInputError(GlanceError):
    """Of all the inputs of a run none could be used; each has been reported."""


class OutputError(GlanceError):
    """A result could not be written (disk full, no permission, not a folder)."""


class Interrupted(GlanceError):
    """Work was stopped by Ctrl-C or a termination signal after saving where it was."""


class CheckpointError(GlanceError):
    """A checkpoint is missing, cut short, foreign, or from a newer version."""


class TeacherError(GlanceError):
    """The pretrained teacher network or its weights cannot be had."""
