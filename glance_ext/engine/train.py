"""Training on normal images: stages 2 and 3, then calibration on held-out images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from glance_ext.data.datasets import split_held_out
from glance_ext.data.images import load_image, resize
from glance_ext.data.patches import Enlarged, Images, Turned, fingerprint, load_training_images
from glance_ext.engine.context_head import CONTEXT_IMAGES, context_stage
from glance_ext.engine.detector import MODEL_FILE, Detector, calibrate
from glance_ext.engine.distill import (
    DistilledNet,
    DistillSettings,
    fine_tune_stage,
    load_local_net,
    packaged_local_net,
)
from glance_ext.engine.distributed import World
from glance_ext.engine.head import head_stage
from glance_ext.engine.joint import joint_stage
from glance_ext.engine.loop import History, Trainer
from glance_ext.engine.memory import fit_memory, load_context_net
from glance_ext.engine.residuals import fit_residual_scale
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.windows import load_windows, read, usable
from glance_ext.errors import GlanceError, InputError, NoUsableInputError
from glance_ext.files import ensure_folder
from glance_ext.models.glance import IMAGE_SIZE, Glance

STATE_FILE = "training.safetensors"
_WHITENING_IMAGES = 32
_MEMORY_IMAGES = 64


@dataclass(frozen=True)
class NormalImages:
    """Images without defects, loaded.

    Attributes:
        images: ``(N, 3, 256, 256)`` RGB in [0, 1], to learn from.
        count: Of how many files they are.
        held_out: Kept from training for calibration: ``(3, 256, 256)`` each, or with tiles files;
            empty if there were too few.
        fingerprint: Tells ``images`` from any others.
    """

    images: Tensor | Enlarged
    count: int
    held_out: Sequence[Tensor | Path] | Enlarged
    fingerprint: str


@dataclass(frozen=True)
class TrainResult:
    """What training made.

    Attributes:
        detector: The calibrated detector, as saved.
        model_file: Where it is.
        history: Losses by stage and name, as (step, value).
        images: How many normal images were trained on.
        held_out: How many were kept for calibration.
        failed: The files that could not be used.
    """

    detector: Detector
    model_file: Path
    history: History
    images: int
    held_out: int
    failed: tuple[InputError, ...]


def train(
    paths: Sequence[Path],
    settings: TrainSettings,
    *,
    output: Path,
    local_net: Path | None = None,
    teacher_weights: Path | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    show_progress: bool = True,
    on_error: Callable[[InputError], None] = lambda error: None,
    world: World | None = None,
    validation: Sequence[Path] = (),
) -> TrainResult:
    """Trains a model on normal images and calibrates it on some that it has not seen.

    Args:
        paths: Normal images.
        settings: See :class:`TrainSettings`.
        output: Folder for the model, and while training runs for its state.
        local_net: A distilled Local-Net; None for the one in the package.
        teacher_weights: Weights of the teacher, for fine-tuning.
        device: Where to train.
        resume: Whether to go on from an interrupted run.
        show_progress: Whether to draw progress bars on standard error.
        on_error: Called for each image that cannot be used.
        world: The processes that train together; each calls this with the same arguments and gets
            the same result, and the first alone writes files.
        validation: Further normal images to calibrate on; without, a share of ``paths`` is kept
            from training for that.

    Raises:
        NoUsableInputError: No image can be used.
        GlanceError: ``paths`` is empty, the output already holds a model, or training diverged.
        CheckpointError: ``local_net`` or the interrupted run's state cannot be used.
        TeacherError: Fine-tuning needs a teacher that cannot be had.
        Interrupted: Ctrl-C; the state is saved.
        OutputError: The output cannot be written.
    """
    world = world or World()
    world.on_first(lambda: _check_output(output, resume))
    if not paths:
        raise GlanceError("train: expected at least one normal image, got none")
    world.on_first(lambda: ensure_folder(output))
    failed: list[InputError] = []

    def note(error: InputError) -> None:
        failed.append(error)
        on_error(error)

    normal = _load_images(paths, validation, settings, note)
    result = train_loaded(
        normal,
        settings,
        output=output,
        local_net=local_net,
        teacher_weights=teacher_weights,
        device=device,
        resume=resume,
        show_progress=show_progress,
        world=world,
    )
    return replace(result, failed=tuple(failed))


def train_loaded(
    normal: NormalImages,
    settings: TrainSettings,
    *,
    output: Path,
    local_net: Path | None = None,
    teacher_weights: Path | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    show_progress: bool = True,
    world: World | None = None,
) -> TrainResult:
    """:func:`train` on images that are loaded already; the same arguments, results and errors."""
    device = torch.device(device)
    world = world or World()
    model_file, state_file = output / MODEL_FILE, output / STATE_FILE
    world.on_first(lambda: _check_output(output, resume))
    world.on_first(lambda: ensure_folder(output))
    images, held_out, found = normal.images, normal.held_out, normal.fingerprint
    optimistic = not held_out
    theirs = world.on_first(lambda: found)
    if found != theirs:
        raise GlanceError(
            f"train: expected every process to find the same images, got {found} in process "
            f"{world.rank} and {theirs} in process 0"
        )
    whiten = settings.whiten and settings.lambda_s > 0
    refit = settings.refit and settings.memory_size > 0 and not optimistic
    distilled = load_local_net(local_net or packaged_local_net(settings.local_net))
    torch.manual_seed(settings.seed)
    model = Glance(
        distilled.local_net,
        patch_scale=settings.patch_scale,
        whiten=whiten,
        whiten_over=settings.whiten_over,
        memory_size=settings.memory_size,
        memory_features=len(distilled.teacher_mean) if settings.memory_of == "teacher" else 0,
        memory_context=settings.memory_size > 0 and settings.memory_of == "context",
        context_head=settings.context_steps > 0,
    ).to(device)
    refitted_head = copy.deepcopy(model.context_head) if refit else None
    if model.context_net is not None:
        load_context_net(model.context_net)
    distilled.decoder.to(device)
    trainer = Trainer(
        state_file,
        {
            **settings.to_json(),
            "images": found,
            "local_net": str(local_net or settings.local_net),
            "device": device.type,
        },
        settings.seed,
        log_dir=output / "tensorboard",
        show_progress=show_progress,
        world=world,
    )
    if resume:
        trainer.resume()
    if settings.fine_tune_steps:
        _fine_tune(trainer, distilled, images, settings, teacher_weights, device)
        trainer.restore_modules({"local_net": model.local_net})

    def bar_over_features(batches: range) -> Iterable[int]:
        quiet = not (show_progress and world.is_first)
        return tqdm(batches, desc="features", unit="batch", disable=quiet, leave=False)

    views: Images = Turned(images) if settings.turns else images
    trainer.run(joint_stage(model, views, settings, device, world))
    trainer.restore_modules({"model": model})
    if settings.head_steps:
        trainer.run(head_stage(model, views, settings, device, bar_over_features))
        trainer.restore_modules({"model": model})

    if settings.context_steps:
        trainer.run(context_stage(model, views, settings, device, progress=bar_over_features))
        trainer.restore_modules({"model": model})

    def of_some(more: Sequence[Tensor], most: int) -> Images:
        some = _some_of(images, more, most)
        return Turned(some) if settings.turns else some

    learnt_later = _loaded(held_out, settings.seed) if refit else []
    if refitted_head is not None:
        everything = of_some(learnt_later, CONTEXT_IMAGES)
        trainer.run(
            context_stage(
                model, everything, settings, device, refitted_head, progress=bar_over_features
            )
        )
        trainer.restore_modules({"refitted_head": refitted_head})

    def with_progress(some: Sequence[Tensor | Path] | Images, what: str) -> Iterator[Tensor]:
        bar = tqdm(
            some,
            desc=what,
            unit="image",
            disable=not (show_progress and world.is_first),
            dynamic_ncols=True,
        )
        return read(bar)

    def fill_memory(shown: Images) -> None:
        fit_memory(
            model,
            with_progress(shown, "memory"),
            count=len(shown),
            grid=settings.grid,
            seed=settings.seed,
            device=device,
            drawn=settings.memory_drawn,
        )

    if whiten:
        # Not on the held-out images: scores of what the scale was fitted to are lower than those
        # of images to come, and a threshold from them would flag more than it promises. Over
        # images, which give one difference each, there would be too few.
        some = (
            held_out or [images[0]]
            if settings.whiten_over == "image"
            else [images[i] for i in _spread(len(images), _WHITENING_IMAGES)]
        )
        fit_residual_scale(model, with_progress(some, "whiten"), grid=settings.grid, device=device)
    if model.memory is not None:
        if settings.memory_of == "teacher":
            model.memory.learn_decoder(
                distilled.decoder, distilled.teacher_mean, distilled.teacher_std
            )
        fill_memory(of_some((), _MEMORY_IMAGES))
    calibration = calibrate(
        model,
        with_progress(held_out or [images[0]], "calibrate"),
        lambda_s=settings.lambda_s,
        standardise=settings.standardise,
        aggregation=settings.aggregation,
        grid=settings.grid,
        tile=settings.tile,
        optimistic=optimistic,
        device=device,
        image_score=settings.image_score,
        memory_share=settings.memory_share,
        context_share=settings.context_share,
        surprisal=settings.surprisal,
    )
    if refit:
        fill_memory(of_some(learnt_later, _MEMORY_IMAGES))
    if refitted_head is not None:
        model.context_head = refitted_head
    record: dict[str, Any] = {
        **settings.to_json(),
        "images": normal.count,
        "teacher": distilled.teacher,
    }
    detector = Detector(model, calibration, record, device=device)
    if world.is_first:
        detector.save(model_file)
        state_file.unlink(missing_ok=True)
    return TrainResult(detector, model_file, trainer.history, normal.count, len(held_out), ())


def _spread(count: int, most: int) -> list[int]:
    """At most so many indices below ``count``, evenly spread."""
    step = max(1.0, count / most)
    return [int(i * step) for i in range(min(count, most))]


def _loaded(held_out: Sequence[Tensor | Path] | Images, seed: int) -> list[Tensor]:
    """Held-out images, ``(3, 256, 256)`` each; windows of files."""
    files = [path for path in held_out if isinstance(path, Path)]
    images = [image for image in held_out if isinstance(image, Tensor)]
    return [*images, *load_windows(files, seed, _unheard)[0]]


def _some_of(images: Tensor | Enlarged, more: Sequence[Tensor], most: int) -> Tensor:
    """At most so many of both together, evenly spread, ``(n, 3, 256, 256)``."""
    count = len(images)
    picks = _spread(count + len(more), most)
    some = [images[i] if i < count else more[i - count] for i in picks]
    return torch.stack([image.to(some[0]) for image in some])


def _unheard(error: InputError) -> None:
    """A file that was told of before."""


def _check_output(output: Path, resume: bool) -> None:
    if (output / MODEL_FILE).exists():
        raise GlanceError(
            f"{output}: already holds a finished model ({MODEL_FILE}); give another --output, or "
            "remove it first"
        )
    if (output / STATE_FILE).exists() and not resume:
        raise GlanceError(
            f"{output}: holds the state of an interrupted run ({STATE_FILE}); go on with --resume, "
            "or remove it first"
        )


def _load_images(
    paths: Sequence[Path],
    validation: Sequence[Path],
    settings: TrainSettings,
    on_error: Callable[[InputError], None],
) -> NormalImages:
    if validation:
        train_paths, held_out_paths = list(paths), list(validation)
    else:
        share = min(settings.held_out_share, settings.held_out_most / max(1, len(paths)))
        train_paths, held_out_paths = split_held_out(paths, share, settings.seed)
        if train_paths == held_out_paths:
            held_out_paths = []
    held_out: Sequence[Tensor | Path]
    if settings.tile:
        images, count = load_windows(train_paths, settings.seed, on_error)
        held_out = usable(held_out_paths, on_error)
        if not count and held_out:
            images, count = load_windows(held_out_paths, settings.seed, lambda error: None)
            held_out = []
    else:
        images = load_training_images(train_paths, IMAGE_SIZE, on_error=on_error)
        count = len(images)
        resized = []
        for path in held_out_paths:
            try:
                resized.append(resize(load_image(path), IMAGE_SIZE))
            except InputError as error:
                on_error(error)
        held_out = resized
        if not count and resized:
            images, count, held_out = torch.stack(resized).to(images.dtype), len(resized), []
    if not count:
        raise NoUsableInputError(
            f"train: expected at least one usable normal image, got 0 of {len(paths)}"
        )
    return NormalImages(images, count, held_out, fingerprint(images))


def _fine_tune(
    trainer: Trainer,
    distilled: DistilledNet,
    images: Tensor | Enlarged,
    settings: TrainSettings,
    teacher_weights: Path | None,
    device: torch.device,
) -> None:
    fine_tune = DistillSettings(
        steps=settings.fine_tune_steps,
        batch_size=settings.fine_tune_batch_size,
        learning_rate=settings.fine_tune_learning_rate,
    )
    teacher = distilled.load_teacher(teacher_weights)
    trainer.run(
        fine_tune_stage(distilled, teacher, images, fine_tune, device, settings.patch_scale)
    )
