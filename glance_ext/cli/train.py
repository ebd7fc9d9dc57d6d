"""``glance-ext train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glance_ext.cli.common import (
    PATH,
    Failures,
    device_option,
    json_option,
    metadata,
    say,
    say_error,
    seed_option,
)

if TYPE_CHECKING:
    import torch


def training_options(command: Any) -> Any:
    """Options that change a preset, and where its networks come from; shared with ``reproduce``."""
    options = (
        click.option("--steps", type=click.IntRange(1), help="Steps of joint training."),
        click.option(
            "--batch-size", type=click.IntRange(1), help="Patches a step of joint training."
        ),
        click.option(
            "--holes-per-image",
            type=click.IntRange(1),
            help="The most patches of a step that come from one image; they share a pass through "
            "Global-Net, so more are faster, and fewer more varied. The paper's is 1.",
        ),
        click.option(
            "--positions",
            help="Where training patches lie: 'uniform' for anywhere, as in the paper, or a stride "
            "in pixels for a grid, whose Local-Net features are computed once and kept where that "
            "is cheaper.",
        ),
        click.option(
            "--turns/--no-turns",
            default=None,
            help="Learn good images turned by quarters and mirrored too, or only as they are, as "
            "the paper does and as is right where a turned part is a defect.",
        ),
        click.option(
            "--stain-uses",
            type=click.IntRange(1),
            help="In how many steps a patch and its stain are used, on average; their Local-Net "
            "features are computed once. The paper's is 1: each step draws new ones.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16"]),
            help="What both networks compute in during joint training; weights, losses and the "
            "optimizer stay in float32. bfloat16 is for processors and GPUs that have it.",
        ),
        click.option(
            "--fine-tune-steps",
            type=click.IntRange(0),
            help="Steps of fine-tuning Local-Net on these images; above 0 needs the teacher.",
        ),
        click.option(
            "--local-net",
            help="A Local-Net from glance-ext distill, or one of the package's: 'fine', which has "
            "learnt a teacher's first layers, or 'deep', a later one of the patch alone.",
        ),
        click.option(
            "--teacher-weights", type=PATH, help="The teacher's weights, for fine-tuning."
        ),
        click.option(
            "--stains",
            type=click.Choice(["small", "wide"]),
            help="What the distortion head learns to tell from good patches: small stains, as in "
            "the paper, or stains of any size, fainter ones too.",
        ),
        click.option(
            "--lambda-s",
            type=click.FloatRange(0, 1),
            help="Share of the inconsistency score in the mix of both heads.",
        ),
        click.option(
            "--whiten/--no-whiten",
            default=None,
            help="Whiten the difference of both features over good patches before it "
            "becomes the inconsistency score; the paper's is plain.",
        ),
        click.option(
            "--whiten-over",
            type=click.Choice(["patch", "image"]),
            help="Whiten each patch's difference, or the mean difference of an image's patches, "
            "where an anomaly is the whole image.",
        ),
        click.option(
            "--surprisal/--no-surprisal",
            default=None,
            help="Bring scores to one scale as -log of the share of good patches that score "
            "higher, or else to mean 0 and variance 1; the paper mixes them raw.",
        ),
        click.option(
            "--memory-size",
            type=click.IntRange(0),
            help="Features of good patches to keep; the distance to the nearest of them then takes "
            "its share of a patch's score. The paper's is 0.",
        ),
        click.option(
            "--memory-drawn",
            type=click.FloatRange(0, 1),
            help="Share of these that is drawn at random, dense where good patches are; the rest "
            "is a coreset, which has what is rare.",
        ),
        click.option(
            "--memory-share",
            type=click.FloatRange(0, 1),
            help="Share of the novelty in a patch's score, with a memory.",
        ),
        click.option(
            "--memory-of",
            type=click.Choice(["context", "teacher", "local"]),
            help="Keep and compare what the first layers of a pretrained network see at a patch in "
            "its image, the teacher's features as Local-Net's decoder tells them, or Local-Net's "
            "own.",
        ),
        click.option(
            "--refit/--no-refit",
            default=None,
            help="Once calibrated, let the memory and the distortion head in context be of the "
            "held-out images too, or keep those of images trained on.",
        ),
        click.option(
            "--context-steps",
            type=click.IntRange(0),
            help="Steps of a second distortion head, over what a memory of context compares and a "
            "layer more, which sees a stain in its image; 0 for none, as in the paper.",
        ),
        click.option(
            "--pieces",
            type=click.IntRange(0),
            help="Pieces of other places to put on an image for that head to learn; 0 for stains "
            "alone.",
        ),
        click.option(
            "--grain/--no-grain",
            default=None,
            help="Let some images that this head learns be noisier or less sharp, as good ones to "
            "come may be.",
        ),
        click.option(
            "--context-share",
            type=click.FloatRange(0, 1),
            help="Its share in what both distortion heads say.",
        ),
        click.option(
            "--distortion",
            type=click.Choice(["stain", "turn"]),
            help="What the distortion head learns to tell from good patches: stains, as in the "
            "paper, or patches turned by quarters, where an anomaly is the whole image.",
        ),
        click.option(
            "--head-steps",
            type=click.IntRange(0),
            help="Further steps of the distortion head alone, with both networks frozen.",
        ),
        click.option(
            "--image-score",
            type=click.Choice(["max", "contrast", "mean"]),
            help="An image's score: the greatest value of its map, that above the map's median, or "
            "the mean.",
        ),
        click.option(
            "--aggregation",
            type=click.Choice(["mean", "gaussian", "max", "idw"]),
            help="How overlapping patches become a map.",
        ),
        click.option(
            "--patch-scale",
            type=click.IntRange(1, 7),
            help="Patches of so many times 33 pixels of the 256x256 image, which Local-Net sees "
            "shrunk to 33x33; positions and grid count shrunk pixels.",
        ),
        click.option(
            "--grid", help="Which patches are scored: a stride in pixels, or 'paper' (20x20)."
        ),
        click.option(
            "--tile",
            is_flag=True,
            default=None,
            help="Learn at the images' own resolution, in windows of 256x256, instead of resizing; "
            "detect then works in such windows too.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def which_local_net(value: str | None) -> tuple[str | None, Path | None]:
    """What ``--local-net`` names: one of the package's, or a file."""
    from glance_ext.engine.settings import LOCAL_NETS

    if value is None or value in LOCAL_NETS:
        return value, None
    if not Path(value).is_file():
        raise click.UsageError(
            f"--local-net: expected {', '.join(LOCAL_NETS)} or a file, got {value}"
        )
    return None, Path(value)


@click.command("train")
@click.argument("dataset", required=False, type=PATH)
@click.option("--normal", type=PATH, help="A folder of images without defects, instead of DATASET.")
@click.option("--output", "-o", required=True, type=PATH, help="Folder for the model.")
@click.option(
    "--preset",
    type=click.Choice(["quick", "default", "paper"]),
    default="default",
    show_default=True,
    help="quick: minutes on a CPU. default: better maps. paper: the paper's steps and rates, for a "
    "GPU; it fine-tunes Local-Net and so needs a teacher.",
)
@training_options
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@seed_option
@device_option
@json_option
def command(
    dataset: Path | None,
    normal: Path | None,
    output: Path,
    preset: str,
    local_net: str | None,
    teacher_weights: Path | None,
    resume: bool,
    seed: int,
    device: torch.device,
    json_file: Path | None,
    **changes: Any,
) -> int:
    """Train a model on images without defects.

    DATASET is a folder in the MVTec layout, whose train/good is used; or give any folder of good
    images with --normal. About one image in five is kept from training to set the threshold.

    Ctrl-C saves where training is; run the same command with --resume to go on.

    Several processes share each step, one GPU or some CPU cores each, if torchrun starts them:
    torchrun --nproc-per-node 2 -m glance_ext.cli train ...
    """
    from glance_ext.data.datasets import normal_images
    from glance_ext.engine.distributed import joined
    from glance_ext.engine.settings import preset as settings_of
    from glance_ext.engine.train import train
    from glance_ext.files import write_json
    from glance_ext.report import plot_losses

    if (dataset is None) == (normal is None):
        raise click.UsageError("expected exactly one of DATASET and --normal DIR")
    packaged, file = which_local_net(local_net)
    settings = settings_of(preset, seed=seed, local_net=packaged, **changes)
    paths = normal_images(dataset, normal)
    with Failures() as failures, joined(device) as (world, place):
        result = train(
            paths,
            settings,
            output=output,
            local_net=file,
            teacher_weights=teacher_weights,
            device=place,
            resume=resume,
            on_error=failures if world.is_first else failures.errors.append,
            world=world,
        )
        if not world.is_first:  # which speaks and writes for all
            return failures.exit_code()
        threshold = result.detector.threshold
        if result.detector.calibration.optimistic:
            say_error(
                "warning: no image could be kept from training, so the threshold is too low; "
                "give more images"
            )
            say(f"trained on {result.images} images, calibrated on one of them")
            say(f"threshold {threshold:.4f}")
        else:
            say(f"trained on {result.images} images, calibrated on {result.held_out} others")
            say(f"threshold {threshold:.4f} (flags at most 5 % of the held-out normal images)")
        say(f"model: {result.model_file}")
        if json_file is not None:
            run = {**metadata(), "settings": settings.to_json(), "device": str(device)}
            content = {
                "metadata": run,
                "images": result.images,
                "held_out": result.held_out,
                "threshold": threshold,
                "losses": result.history,
            }
            write_json(json_file, content)
        plot_losses(output / "losses.png", result.history)
    return failures.exit_code()
