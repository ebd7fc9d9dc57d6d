"""``glance-ext doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from glance_ext.cli.common import SOME_FAILED, json_option, say


@click.command("doctor")
@json_option
def command(json_file: Path | None) -> int:
    """Say what is installed, what was built for which devices, and what is missing.

    Exits with 1 if something that glance-ext needs is missing or broken.
    """
    from glance_ext.doctor import examine, format_report, to_json
    from glance_ext.files import write_json

    report = examine()
    say(format_report(report))
    if json_file is not None:
        write_json(json_file, to_json(report))
    return 0 if report.ok else SOME_FAILED
