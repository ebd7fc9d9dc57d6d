"""``glance-ext reproduce``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from glance_ext.cli.common import (
    PATH,
    SOME_FAILED,
    Failures,
    device_option,
    json_option,
    metadata,
    say,
    say_error,
    seed_option,
)
from glance_ext.cli.train import training_options, which_local_net
from glance_ext.errors import GlanceError, NoUsableInputError

if TYPE_CHECKING:
    import torch

    from glance_ext.engine.reproduce import Figures, Plan

T = TypeVar("T")

_DATASETS = {
    "mvtec": "MVTec AD, CATEGORY/train/good, test and ground_truth; beside the paper's Table 1.",
    "visa": "VisA by its official one-class split, split_csv/1cls.csv.",
    "btad": "BTAD, CATEGORY/train/ok, test and ground_truth.",
    "mvtec-ad-2": "The public part of MVTec AD 2; PRO is integrated to 5 %, as its authors do.",
}


@click.group("reproduce")
def command() -> None:
    """Train and measure every category of a data set, beside the paper's table.

    Each category is trained and measured once. The same command goes on where an earlier one
    stopped, and prints what is there. Every category has a folder in --output with its model and
    result.json; results.json has all of them.
    """


def _shared_options(preset: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            json_option,
            device_option,
            seed_option,
            training_options,
            click.option(
                "--preset",
                type=click.Choice(["quick", "default", "paper"]),
                default=preset,
                show_default=True,
                help="Settings of training; paper's fine-tunes Local-Net and so needs a teacher.",
            ),
            click.option(
                "--output", "-o", type=PATH, help="Folder for results [default: runs/DATASET]."
            ),
            click.argument("root", type=PATH),
        ):
            run = option(run)
        return run

    return decorate


def _layout_command(name: str, title: str) -> click.Command:
    @click.command(name, help=f"{title}\n\nROOT is the folder that holds the categories.")
    @_shared_options("paper")
    @click.option("--category", multiple=True, help="Only this one; may be given repeatedly.")
    @functools.wraps(_reproduce_layout)
    def run(**arguments: Any) -> int:
        return _reproduce_layout(name, **arguments)

    return run


def _reproduce_layout(
    dataset: str, root: Path, category: tuple[str, ...], json_file: Path | None, **options: Any
) -> int:
    from glance_ext.data.layouts import LAYOUTS, chosen
    from glance_ext.engine.reproduce import run_category

    layout = LAYOUTS[dataset]
    names = chosen(layout.categories(root), category, root)
    plan = _plan(dataset, {"pro_limit": layout.pro_limit}, options)
    with Failures() as failures:

        def run(name: str) -> Figures:
            return run_category(
                plan,
                layout.read(root, name),
                pro_limit=layout.pro_limit,
                on_error=failures,
                progress=_bar("evaluate", "image"),
            )

        header = [f"PRO {layout.pro_limit:.0%}", "image AUROC", "pixel AUROC"]
        keys = ["pixel_AUPRO", "image_AUROC", "pixel_AUROC"]
        code = _run(plan, names, run, "category", header, keys, json_file)
    return max(code, failures.exit_code())


for _name, _title in _DATASETS.items():
    command.add_command(_layout_command(_name, _title))


@command.command("cifar10")
@_shared_options("default")
@click.option(
    "--class", "normal", multiple=True, help="Only this normal class; may be given repeatedly."
)
def cifar10(root: Path, normal: tuple[str, ...], json_file: Path | None, **options: Any) -> int:
    """One-class CIFAR-10, beside the paper's Table 3.

    ROOT is the folder cifar-10-batches-py, its .tar.gz or the folder that holds it, or a folder or
    zip archive of images in train/CLASS and test/CLASS. A model learns the training images of one
    class; its image AUROC is over all 10,000 test images.

    The images are enlarged to 256x256. --patch-scale is 6 and --grid 9 unless given: four patches
    of three quarters of an image's side. What does not belong is the whole image: --image-score is
    mean and --whiten-over image. With --preset default, patches are distorted by --distortion turn,
    and training is short.
    """
    from glance_ext.data.cifar import CLASSES, Cifar10
    from glance_ext.engine.cifar import SCHEDULE, SETTING, OneClass

    for name in normal:
        if name not in CLASSES:
            raise GlanceError(f"--class: expected one of {', '.join(CLASSES)}, got {name!r}")
    short = SCHEDULE if options["preset"] == "default" else {}
    for key, value in {**SETTING, **short}.items():
        options[key] = value if options.get(key) is None else options[key]
    if options["preset"] != "paper" and options["positions"] is None:
        options["positions"] = options["grid"]
    if options["tile"]:
        raise GlanceError("--tile: expected images of 256x256 or more, CIFAR-10's are of 32x32")
    plan = _plan("cifar10", {}, options)
    with Failures() as failures:
        one_class = OneClass(Cifar10(root), failures)

        def run(name: str) -> Figures:
            return one_class.run(plan, name, _bar("score", "batch"))

        names = list(dict.fromkeys(normal)) or list(CLASSES)
        code = _run(plan, names, run, "normal class", ["AUROC"], ["image_AUROC"], json_file)
    return max(code, failures.exit_code())


def _plan(dataset: str, protocol: dict[str, Any], options: dict[str, Any]) -> Plan:
    from glance_ext.engine.reproduce import Plan
    from glance_ext.engine.settings import preset as settings_of
    from glance_ext.files import ensure_folder

    output: Path = options.pop("output") or Path("runs") / dataset
    device: torch.device = options.pop("device")
    packaged, local_net = which_local_net(options.pop("local_net"))
    teacher_weights = options.pop("teacher_weights")
    settings = settings_of(options.pop("preset"), local_net=packaged, **options)
    ensure_folder(output)
    return Plan(
        dataset,
        settings,
        output,
        local_net,
        teacher_weights,
        device,
        protocol,
        {**metadata(), "device": str(device)},
    )


def _run(
    plan: Plan,
    names: Sequence[str],
    run: Callable[[str], Figures],
    what: str,
    header: Sequence[str],
    keys: Sequence[str],
    json_file: Path | None,
) -> int:
    """Runs all, prints the table, and returns the exit code."""
    from glance_ext.engine.reproduce import SUMMARY_FILE, run_all, summary
    from glance_ext.files import write_json

    failed: list[str] = []

    def on_start(name: str, done: bool) -> None:
        say(f"{name}: {'done before' if done else 'begins'}")

    def on_failure(name: str, error: GlanceError) -> None:
        failed.append(name)
        say_error(f"{name}: left out: {error}")

    results = run_all(plan, names, run, on_start=on_start, on_failure=on_failure)
    if not results:
        raise NoUsableInputError(f"reproduce: none of {', '.join(names)} could be run")
    content = summary(plan, results)
    say("\n" + _table(content, what, header, keys))
    say(f"\nresults: {plan.output / SUMMARY_FILE}")
    if json_file is not None:
        write_json(json_file, content)
    if failed:
        say_error(f"left out: {', '.join(failed)} (see above)")
    return SOME_FAILED if failed else 0


def _table(content: Figures, what: str, header: Sequence[str], keys: Sequence[str]) -> str:
    """Ours, and the paper's columns where it has this data set; the means are of these rows."""
    from glance_ext.engine.paper import OURS
    from glance_ext.report import format_table

    paper: dict[str, dict[str, float]] = content.get("paper", {})
    columns = list(next(iter(paper.values()), {}))
    rows = [
        [
            name,
            *(_show(metrics[key]) for key in keys),
            *(_show(paper.get(name, {}).get(column)) for column in columns),
        ]
        for name, metrics in content["results"].items()
    ]
    mean, paper_mean = content["mean"], content.get("paper_mean", {})
    rows.append(
        [
            "mean",
            *(_show(mean[key]) for key in keys),
            *(_show(paper_mean[column]) for column in columns),
        ]
    )
    titles = [f"{c}, paper" if c == OURS else c for c in columns]
    return format_table([what, *(f"{title}, here" for title in header), *titles], rows)


def _show(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _bar(description: str, unit: str) -> Callable[[Sequence[T]], Iterable[T]]:
    from tqdm import tqdm

    return functools.partial(tqdm, desc=description, unit=unit, dynamic_ncols=True)
