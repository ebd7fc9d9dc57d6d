"""The command line: each command parses, calls, and prints."""

from __future__ import annotations

from importlib import import_module

import click

from glance_ext import __version__
from glance_ext.cli.common import GlanceGroup

# Loaded when called for, so that --help answers at once.
_COMMANDS = {
    "bench": "Measure the native code against its reference, limit and peers.",
    "demo": "Train and detect on photographed textures, and write a report.",
    "detect": "Find anomalies in images: maps, heatmaps and scores.",
    "distill": "Distil a pretrained teacher into a new Local-Net.",
    "doctor": "Say what is installed, what was built, and what is missing.",
    "evaluate": "Measure a model on a labelled data set.",
    "reproduce": "Train and measure all categories of a data set, beside the paper's table.",
    "train": "Train a model on images without defects.",
}


class _LazyGroup(GlanceGroup):
    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        return import_module(f"glance_ext.cli.{name}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glance-ext")
def main() -> None:
    r"""Find what does not belong: anomaly maps from images without defects.

    \b
    Three steps:
      glance-ext train --normal GOOD_IMAGES --output MODEL
      glance-ext detect MODEL NEW_IMAGES --output RESULTS
      glance-ext evaluate MODEL DATASET

    Exit codes: 0 all well, 1 some inputs failed or a result could not be written, 2 the call was
    wrong, 130 interrupted.
    """
