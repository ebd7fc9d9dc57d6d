"""Stages 1 and 2: a teacher's features, distilled into Local-Net (paper, section 3.2)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.data.patches import (
    Enlarged,
    crop_patches,
    fingerprint,
    load_mixed_images,
    sample_positions,
    sample_scaled_patches,
    varied,
)
from glance_ext.engine.checkpoint import load_checkpoint, load_module, prefixed, save_checkpoint
from glance_ext.engine.loop import History, Stage, Trainer, step_generator
from glance_ext.engine.settings import LOCAL_NETS
from glance_ext.errors import CheckpointError, GlanceError, InputError, NoUsableInputError
from glance_ext.files import ensure_folder
from glance_ext.models.local_net import Decoder, LocalNet, compactness_loss, knowledge_loss
from glance_ext.models.normalisation import IMAGE_MEAN, IMAGE_STD, normalise
from glance_ext.models.teacher import Teacher, load_teacher

LOCAL_NET_KIND = "local_net"
PATCH_SIZE = 33
_CROP_SIDES = (64, 400)  # pixels that a crop for a teacher in context shows
_STATISTICS_BATCHES = 32
_STATISTICS_BATCH, _STATISTICS_CROPS = 64, 4  # patches; crops with hundreds of patches each


@dataclass(frozen=True)
class DistillSettings:
    """Settings of a distillation; the defaults are the paper's where it names one.

    Attributes:
        steps: Steps of Adam.
        batch_size: Patches a step.
        learning_rate: Of Adam.
        decay: Share of the steps, the last ones, in which it falls to 0; the paper's is 0.
        lambda_k: Weight of the knowledge loss.
        lambda_c: Weight of the compactness loss.
        kernel_size: Local-Net's first convolution.
        features: n, the length of a feature.
        bfloat16: Whether matrix products run in bfloat16 (autocast).
        seed: Of everything random.
    """

    steps: int = 50_000
    batch_size: int = 64
    learning_rate: float = 2e-4
    decay: float = 0.0
    lambda_k: float = 1.0
    lambda_c: float = 1.0
    kernel_size: int = 5
    features: int = 128
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            GlanceError: Names the setting, what it may be, and what came.
        """
        if self.steps < 1 or self.batch_size < 2:
            raise GlanceError(
                "distill: expected at least 1 step and a batch size of at least 2, got "
                f"{self.steps} and {self.batch_size}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise GlanceError(f"learning rate: expected a number above 0, got {self.learning_rate}")
        if not 0 <= self.decay <= 1:
            raise GlanceError(f"decay: expected a share between 0 and 1, got {self.decay}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        left = (self.steps - step) / self.steps
        return self.learning_rate * (min(1.0, left / self.decay) if self.decay else 1.0)


@dataclass
class DistilledNet:
    """A Local-Net, the decoder it was distilled with, and the teacher that both belong to.

    Attributes:
        local_net: The network.
        decoder: Frozen in stage 2.
        teacher: Name, layer and input size of the teacher, and how it was distilled.
        teacher_mean: ``(t,)``, the mean of the teacher's feature, subtracted before distillation.
        teacher_std: ``(t,)``.
    """

    local_net: LocalNet
    decoder: Decoder
    teacher: dict[str, Any]
    teacher_mean: Tensor
    teacher_std: Tensor

    def load_teacher(self, weights: str | os.PathLike[str] | None = None) -> Teacher:
        """Builds the teacher that this network was distilled from."""
        return load_teacher(
            self.teacher["name"],
            layer=self.teacher["layer"],
            weights=weights,
            input_size=int(self.teacher["input_size"]),
            context=bool(self.teacher.get("context", False)),
        )


@dataclass(frozen=True)
class DistillResult:
    """What a distillation made: the network, and its losses by name as (step, value)."""

    net: DistilledNet
    history: History


def save_local_net(path: str | os.PathLike[str], net: DistilledNet) -> None:
    """Writes a distilled Local-Net as a checkpoint of its own."""
    metadata = {
        "kernel_size": net.local_net.kernel_size,
        "features": net.local_net.features,
        "teacher": net.teacher,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    tensors = {
        **prefixed(net.local_net, "local_net"),
        **prefixed(net.decoder, "decoder"),
        "teacher_mean": net.teacher_mean,
        "teacher_std": net.teacher_std,
    }
    save_checkpoint(path, LOCAL_NET_KIND, tensors, metadata)


def load_local_net(path: str | os.PathLike[str]) -> DistilledNet:
    """Reads what :func:`save_local_net` wrote; a file of 16-bit floats is widened.

    Raises:
        CheckpointError: The file cannot be used.
    """
    tensors, metadata = load_checkpoint(path, LOCAL_NET_KIND)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    try:
        local_net = LocalNet(int(metadata["kernel_size"]), int(metadata["features"]))
        decoder = Decoder(local_net.features, tensors["decoder.linear.bias"].numel())
        teacher = dict(metadata["teacher"])
        mean, std = tensors["teacher_mean"], tensors["teacher_std"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the Local-Net's metadata is incomplete: {error}") from error
    load_module(local_net, tensors, "local_net", path)
    load_module(decoder, tensors, "decoder", path)
    return DistilledNet(local_net.eval(), decoder.eval(), teacher, mean, std)


def packaged_local_net(name: str = LOCAL_NETS[0]) -> Path:
    """A pretrained Local-Net in the package; docs/method.md says how each was made."""
    return Path(__file__).resolve().parent.parent / "weights" / f"local_net_{name}.safetensors"


def distill(
    paths: Sequence[Path],
    teacher: Teacher,
    settings: DistillSettings,
    *,
    output: Path,
    device: torch.device,
    resume: bool = False,
    show_progress: bool = True,
    on_error: Callable[[InputError], None],
) -> DistillResult:
    """Stage 1: distils ``teacher`` into a new Local-Net on random patches of any images.

    Args:
        paths: Image files.
        teacher: The frozen teacher.
        settings: See :class:`DistillSettings`.
        output: Where the finished Local-Net is written; the state of training is kept beside it
            while it runs.
        device: Where to train.
        resume: Whether to go on from an interrupted run.
        show_progress: Whether to draw a progress bar.
        on_error: Called for each image that cannot be used.

    Raises:
        GlanceError: No image can be used, there is a file at ``output`` or the state of a run that
            ``resume`` does not ask for, or training diverged.
        CheckpointError: ``resume`` with other settings or a damaged state.
        Interrupted: Ctrl-C; the state is saved.
        OutputError: The output cannot be written.
    """
    state = output.with_name(output.name + ".training")
    if output.exists():
        raise GlanceError(f"{output}: already there; give another --output, or remove it first")
    if state.exists() and not resume:
        raise GlanceError(
            f"{state}: the state of an interrupted run; go on with --resume, or remove it first"
        )
    ensure_folder(output.parent)
    images = load_mixed_images(paths, longest_side=1024, on_error=on_error)
    if not images:
        raise NoUsableInputError(
            f"distill: expected at least one usable image, got 0 of {len(paths)}"
        )

    def sample(count: int, generator: torch.Generator) -> Tensor:
        if not teacher.context:
            return sample_scaled_patches(images, count, PATCH_SIZE, generator).to(device)
        smallest, largest = _CROP_SIDES
        crops = sample_scaled_patches(
            images,
            count,
            teacher.input_size,
            generator,
            smallest_side=smallest,
            largest_side=largest,
        )
        return varied(crops, generator).to(device)

    torch.manual_seed(settings.seed)
    teacher = teacher.to(device)
    local_net = LocalNet(settings.kernel_size, settings.features).to(device)

    def some(generator: torch.Generator) -> Tensor:
        return sample(_STATISTICS_CROPS if teacher.context else _STATISTICS_BATCH, generator)

    mean, std = _teacher_statistics(teacher, some, settings.seed)
    decoder = Decoder(settings.features, mean.numel()).to(device)
    description = {
        "name": teacher.name,
        "layer": teacher.layer,
        "input_size": teacher.input_size,
        "context": teacher.context,
        "images": len(images),
        **asdict(settings),
    }
    net = DistilledNet(local_net, decoder, description, mean, std)
    optimizer = torch.optim.Adam(
        [*local_net.parameters(), *decoder.parameters()], lr=settings.learning_rate
    )

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        patches = sample(settings.batch_size, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            taught = teacher(patches)
            features = describe(local_net, patches)
            decoded = decoder(features)
        taught = (taught.float() - mean) / std
        return distillation_losses(features.float(), decoded.float(), taught, settings)

    trainer = Trainer(
        state,
        {**description, "images": fingerprint(images)},
        settings.seed,
        show_progress=show_progress,
    )
    if resume:
        trainer.resume()
    modules = {"local_net": local_net, "decoder": decoder}
    stage = Stage(
        "distill",
        settings.steps,
        step,
        optimizer,
        modules,
        learning_rate=settings.learning_rate_at,
    )
    trainer.run(stage)
    trainer.restore_modules(modules)
    standardise_local_net(net, some, settings.seed)
    save_local_net(output, net)
    state.unlink(missing_ok=True)
    return DistillResult(net, trainer.history)


def describe(local_net: LocalNet, images: Tensor) -> Tensor:
    """Features ``(M, n)`` of patches, or of all patches at stride 4 in larger crops.

    Args:
        local_net: Any.
        images: ``(B, 3, S, S)``, RGB in [0, 1].
    """
    if images.shape[-1] == PATCH_SIZE:
        return local_net(normalise(images))
    x = normalise(images).contiguous(memory_format=torch.channels_last)
    return local_net.layers(x).permute(0, 2, 3, 1).flatten(0, 2)


def distillation_losses(
    features: Tensor, decoded: Tensor, taught: Tensor, settings: DistillSettings
) -> dict[str, Tensor]:
    """``l_local = lambda_k l_k + lambda_c l_c`` (paper, equation 3) and its parts."""
    knowledge = knowledge_loss(decoded, taught)
    compactness = compactness_loss(features)
    return {
        "loss": settings.lambda_k * knowledge + settings.lambda_c * compactness,
        "knowledge": knowledge,
        "compactness": compactness,
    }


def fine_tune_stage(
    net: DistilledNet,
    teacher: Teacher,
    images: Tensor | Enlarged,
    settings: DistillSettings,
    device: torch.device,
    shrink: int = 1,
) -> Stage:
    """Stage 2: the same loss on the category's normal images, decoder frozen.

    Args:
        net: Trained in place.
        teacher: The one that ``net`` was distilled from.
        images: ``(N, 3, H, W)``, RGB in [0, 1]; patches are cut at this resolution.
        settings: Steps, batch size, learning rate and weights.
        device: Where to train.
        shrink: By how much images are shrunk before patches are cut.

    Raises:
        GlanceError: The teacher sees crops that are larger than the images.
    """
    local_net, decoder = net.local_net, net.decoder.requires_grad_(False)
    mean, std = net.teacher_mean.to(device), net.teacher_std.to(device)
    teacher = teacher.to(device)
    side = teacher.input_size if teacher.context else PATCH_SIZE
    size = (images.shape[-2] // shrink, images.shape[-1] // shrink)
    if side > min(size):
        raise GlanceError(
            f"fine-tuning: expected images of at least {side} pixels a side, which the teacher of "
            f"this Local-Net sees at a time, got {size[0]}x{size[1]}"
        )

    def sample(count: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(images), (count,), generator=generator)
        origins = sample_positions(count, size, side, generator)
        drawn = images[picks].float()
        if shrink > 1:
            drawn = F.avg_pool2d(drawn, shrink)
        return crop_patches(drawn, origins, side).to(device)

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        patches = sample(settings.batch_size, generator)
        taught = (teacher(patches) - mean) / std
        features = describe(local_net, patches)
        return distillation_losses(features, decoder(features), taught, settings)

    optimizer = torch.optim.Adam(local_net.parameters(), lr=settings.learning_rate)
    return Stage("finetune", settings.steps, step, optimizer, {"local_net": local_net})


@torch.no_grad()
def standardise_local_net(
    net: DistilledNet, sample: Callable[[torch.Generator], Tensor], seed: int
) -> None:
    """Scales Local-Net's output channels to mean 0, variance 1 over freshly drawn patches."""
    features = torch.cat(
        [
            describe(net.local_net, patches)
            for patches in _statistics_patches(sample, f"scale{net.local_net.features}", seed)
        ]
    )
    std = features.std(0).clamp_min(1e-6)
    net.local_net.standardise(features.mean(0), std, net.decoder)


def _teacher_statistics(
    teacher: Teacher, sample: Callable[[torch.Generator], Tensor], seed: int
) -> tuple[Tensor, Tensor]:
    taught = torch.cat([teacher(patches) for patches in _statistics_patches(sample, "stats", seed)])
    # A channel that never moves carries nothing to learn: a floor keeps it finite and small.
    std = taught.std(0)
    return taught.mean(0), std.clamp_min(1e-3 * float(std.max()) + 1e-12)


def _statistics_patches(
    sample: Callable[[torch.Generator], Tensor], name: str, seed: int
) -> list[Tensor]:
    return [sample(step_generator(seed, name, index)) for index in range(_STATISTICS_BATCHES)]
