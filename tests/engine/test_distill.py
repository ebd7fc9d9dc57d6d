from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glance_ext.data.patches import load_mixed_images, sample_scaled_patches
from glance_ext.engine import distill as module
from glance_ext.engine.checkpoint import load_checkpoint, save_checkpoint
from glance_ext.engine.distill import (
    LOCAL_NET_KIND,
    DistillResult,
    DistillSettings,
    describe,
    distill,
    load_local_net,
    packaged_local_net,
)
from glance_ext.engine.loop import step_generator
from glance_ext.engine.settings import LOCAL_NETS
from glance_ext.errors import (
    CheckpointError,
    GlanceError,
    InputError,
    Interrupted,
    NoUsableInputError,
    OutputError,
)
from glance_ext.models.local_net import Decoder
from glance_ext.models.normalisation import normalise
from glance_ext.models.teacher import Teacher

SETTINGS = DistillSettings(steps=6, batch_size=8, features=8, learning_rate=1e-3)

pytestmark = pytest.mark.usefixtures("few_statistics")


def run(
    paths: list[Path],
    teacher: Teacher,
    output: Path,
    settings: DistillSettings = SETTINGS,
    resume: bool = False,
    on_error: Callable[[InputError], None] = lambda error: None,
) -> DistillResult:
    return distill(
        paths,
        teacher,
        settings,
        output=output,
        device=torch.device("cpu"),
        resume=resume,
        show_progress=False,
        on_error=on_error,
    )


def test_a_distilled_net_is_written_with_its_teachers_name(
    pictures: list[Path], teacher: Teacher, tmp_path: Path
) -> None:
    result = run(pictures, teacher, tmp_path / "net")
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    net = load_local_net(tmp_path / "net")
    assert (net.teacher["name"], net.teacher["layer"], net.teacher["input_size"]) == (
        "tiny", "all", 32
    )  # fmt: skip
    assert net.teacher["images"] == 6
    for a, b in zip(net.local_net.parameters(), result.net.local_net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert list(result.history) == [f"distill/{n}" for n in ("loss", "knowledge", "compactness")]


def test_features_have_mean_0_and_variance_1(
    pictures: list[Path], teacher: Teacher, tmp_path: Path
) -> None:
    net = run(pictures, teacher, tmp_path / "net").net
    images = load_mixed_images(pictures, longest_side=1024, on_error=pytest.fail)
    patches = torch.cat(
        [sample_scaled_patches(images, 32, 33, step_generator(0, "scale8", i)) for i in range(3)]
    )
    with torch.no_grad():
        features = net.local_net(normalise(patches))
    torch.testing.assert_close(features.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(8), atol=1e-3, rtol=0)


def test_the_teacher_is_taught_by_its_own_mean_and_deviation(
    pictures: list[Path], teacher: Teacher, tmp_path: Path
) -> None:
    net = run(pictures, teacher, tmp_path / "net").net
    images = load_mixed_images(pictures, longest_side=1024, on_error=pytest.fail)
    taught = torch.cat(
        [
            teacher(sample_scaled_patches(images, 32, 33, step_generator(0, "stats", i)))
            for i in range(3)
        ]
    )
    torch.testing.assert_close(net.teacher_mean, taught.mean(0))
    torch.testing.assert_close(net.teacher_std, taught.std(0))


def test_the_net_comes_to_know_what_its_teacher_says(
    pictures: list[Path], teacher: Teacher, tmp_path: Path
) -> None:
    settings = DistillSettings(
        steps=80, batch_size=16, features=8, learning_rate=1e-3, lambda_c=0.1
    )
    result = run(pictures, teacher, tmp_path / "net", settings)
    points = [value for _, value in result.history["distill/knowledge"]]
    assert points[-1] < 0.6 * points[0]
    # what is saved still speaks the teacher's language after standardising
    net = load_local_net(tmp_path / "net")
    images = load_mixed_images(pictures, longest_side=1024, on_error=pytest.fail)
    patches = sample_scaled_patches(images, 64, 33, torch.Generator().manual_seed(8))
    with torch.no_grad():
        taught = (teacher(patches) - net.teacher_mean) / net.teacher_std
        decoded = net.decoder(net.local_net(normalise(patches)))
    assert (decoded - taught).square().mean() < 0.8


@pytest.mark.parametrize("call", [1, 4, 6])
def test_an_interrupted_distillation_ends_with_the_same_bits(
    pictures: list[Path],
    teacher: Teacher,
    tmp_path: Path,
    interrupt_at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    run(pictures, teacher, tmp_path / "whole")
    interrupt_at(module, "distillation_losses", call)
    with pytest.raises(Interrupted, match=f"after step {call} of 6 of stage 'distill'"):
        run(pictures, teacher, tmp_path / "net")
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "net.training"}
    with pytest.raises(GlanceError, match=r"net\.training: the state of an interrupted run"):
        run(pictures, teacher, tmp_path / "net")
    other = DistillSettings(steps=6, batch_size=8, features=8, learning_rate=2e-3)
    with pytest.raises(CheckpointError, match=r"learning_rate = 0\.001, got 0\.002"):
        run(pictures, teacher, tmp_path / "net", other, resume=True)
    with pytest.raises(CheckpointError, match=r"images = '6 \(sha256"):
        run(pictures[1:], teacher, tmp_path / "net", resume=True)
    run(pictures, teacher, tmp_path / "net", resume=True)
    assert (tmp_path / "net").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "net"}


def test_bfloat16_gives_a_net_too(pictures: list[Path], teacher: Teacher, tmp_path: Path) -> None:
    settings = DistillSettings(steps=2, batch_size=4, features=8, bfloat16=True)
    run(pictures, teacher, tmp_path / "net", settings)
    assert all(
        torch.isfinite(p).all() for p in load_local_net(tmp_path / "net").local_net.parameters()
    )


def test_bad_images_are_reported_and_left_out(
    pictures: list[Path], teacher: Teacher, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.touch()
    errors: list[InputError] = []
    result = run([bad, *pictures], teacher, tmp_path / "net", on_error=errors.append)
    assert [error.path for error in errors] == [str(bad)]
    assert result.net.teacher["images"] == 6
    with pytest.raises(NoUsableInputError, match="at least one usable image, got 0 of 1"):
        run([bad], teacher, tmp_path / "other", on_error=errors.append)


def test_what_is_there_is_not_overwritten_and_what_cannot_be_written_found_first(
    pictures: list[Path], teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LocalNet", lambda *_: pytest.fail("distilled in vain"))
    (tmp_path / "file").write_text("precious")
    for there in (tmp_path, tmp_path / "file"):
        with pytest.raises(GlanceError, match="already there"):
            run(pictures, teacher, there)
    with pytest.raises(OutputError, match="cannot write to this folder"):
        run(pictures, teacher, tmp_path / "file" / "net")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("drop", ["kernel_size", "features", "teacher", "teacher_mean"])
def test_an_incomplete_local_net_is_refused(
    local_net_file: Path, tmp_path: Path, drop: str
) -> None:
    tensors, metadata = load_checkpoint(local_net_file, LOCAL_NET_KIND)
    for values in (tensors, metadata):
        values.pop(drop, None)  # type: ignore[attr-defined]
    save_checkpoint(tmp_path / "net", LOCAL_NET_KIND, tensors, metadata)
    with pytest.raises(CheckpointError, match=f"metadata is incomplete: '{drop}'"):
        load_local_net(tmp_path / "net")


def test_a_local_net_of_another_shape_is_refused(local_net_file: Path, tmp_path: Path) -> None:
    tensors, metadata = load_checkpoint(local_net_file, LOCAL_NET_KIND)
    changes: list[dict[str, Any]] = [{"kernel_size": 3}, {"features": 9}, {"kernel_size": 4}]
    for change in changes:
        save_checkpoint(tmp_path / "net", LOCAL_NET_KIND, tensors, {**metadata, **change})
        with pytest.raises(CheckpointError):
            load_local_net(tmp_path / "net")


def test_16_bit_weights_are_widened(local_net_file: Path, tmp_path: Path) -> None:
    tensors, metadata = load_checkpoint(local_net_file, LOCAL_NET_KIND)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_checkpoint(tmp_path / "net", LOCAL_NET_KIND, half, metadata)
    net = load_local_net(tmp_path / "net")
    assert all(p.dtype == torch.float32 for p in net.local_net.parameters())
    assert torch.equal(net.local_net.layers[0].weight, half["local_net.layers.0.weight"].float())


@pytest.mark.parametrize("name", LOCAL_NETS)
def test_the_package_carries_standardised_local_nets(name: str) -> None:
    net = load_local_net(packaged_local_net(name))
    assert net.local_net.features == 128
    assert net.teacher.get("context", False) == (name == "fine")
    assert {"name", "layer", "input_size"} <= net.teacher.keys()
    with torch.no_grad():
        features = net.local_net(normalise(torch.rand(4, 3, 33, 33)))
    assert torch.isfinite(features).all()


def test_the_learning_rate_falls_at_the_end() -> None:
    rates = [
        DistillSettings(steps=10, learning_rate=2.0, decay=0.4).learning_rate_at(step)
        for step in range(10)
    ]
    assert rates == pytest.approx([2, 2, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5])
    assert {DistillSettings(steps=10).learning_rate_at(step) for step in range(10)} == {2e-4}


def test_the_net_is_distilled_at_that_rate(
    pictures: list[Path], teacher: Teacher, tmp_path: Path
) -> None:
    constant = run(pictures, teacher, tmp_path / "constant")
    falling = run(pictures, teacher, tmp_path / "falling", replace(SETTINGS, decay=1.0))
    (first, *_), (same, *_) = (r.history["distill/loss"] for r in (constant, falling))
    assert first == same  # before the first step
    weights = [r.net.local_net.layers[0].get_parameter("weight") for r in (constant, falling)]
    assert not torch.equal(*weights)


# ---------------------------------------------------------------- a teacher in context


def teacher_in_context() -> Teacher:
    torch.manual_seed(6)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 7, stride=4, padding=3), torch.nn.Tanh())
    return Teacher(
        network, name="tiny", layer="all", input_size=65, mean=(0.5,) * 3, std=(0.2,) * 3,
        context=True,
    )  # fmt: skip


def test_a_crop_is_described_patch_by_patch(local_net_file: Path) -> None:
    net = load_local_net(local_net_file).local_net
    crops = torch.rand(2, 3, 65, 65)
    with torch.no_grad():
        found = describe(net, crops)
        patches = crops.unfold(2, 33, 4).unfold(3, 33, 4).permute(0, 2, 3, 1, 4, 5)
        wanted = describe(net, patches.flatten(0, 2))
    assert len(wanted) == 2 * 9 * 9
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_net_comes_to_know_what_a_teacher_says_in_context(
    pictures: list[Path], tmp_path: Path
) -> None:
    settings = DistillSettings(
        steps=120, batch_size=2, features=8, learning_rate=2e-3, decay=0.3, lambda_c=0.1
    )
    result = run(pictures, teacher_in_context(), tmp_path / "net", settings)
    points = [value for _, value in result.history["distill/knowledge"]]
    assert points[-1] < 0.6 * points[0]
    net = load_local_net(tmp_path / "net")
    assert net.teacher["context"] is True
    assert net.teacher["decay"] == 0.3
    images = load_mixed_images(pictures, longest_side=1024, on_error=pytest.fail)
    crops = sample_scaled_patches(images, 8, 65, torch.Generator().manual_seed(8))
    with torch.no_grad():
        taught = (teacher_in_context()(crops) - net.teacher_mean) / net.teacher_std
        decoded = net.decoder(describe(net.local_net, crops))
    assert (decoded - taught).square().mean() < 0.8 * taught.square().mean()


def test_fine_tuning_shows_a_teacher_in_context_whole_crops(local_net_file: Path) -> None:
    net = load_local_net(local_net_file)
    teacher = teacher_in_context()
    net.decoder, net.teacher_mean, net.teacher_std = Decoder(8, 5), torch.zeros(5), torch.ones(5)
    seen: list[torch.Tensor] = []
    teacher.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    settings, cpu = DistillSettings(steps=1, batch_size=2), torch.device("cpu")
    images = torch.rand(3, 3, 128, 128)
    stage = module.fine_tune_stage(net, teacher, images, settings, cpu)
    losses = stage.step(torch.Generator().manual_seed(0))
    assert seen[0].shape == (2, 3, 65, 65)
    assert torch.isfinite(losses["loss"])
    with pytest.raises(GlanceError, match=r"images of at least 65 pixels a side.*got 64x64"):
        module.fine_tune_stage(net, teacher, images, settings, cpu, shrink=2)


def test_a_teacher_in_context_is_built_again_from_the_file(
    local_net_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "load_teacher", lambda name, **options: asked.append(options))
    net = load_local_net(local_net_file)
    net.load_teacher()
    net.teacher["context"] = True
    net.load_teacher()
    assert [options["context"] for options in asked] == [False, True]


def test_fine_tuning_cuts_its_patches_from_the_shrunk_image(
    local_net_file: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    crop = module.crop_patches
    monkeypatch.setattr(module, "crop_patches", lambda *a: seen.append(a[0]) or crop(*a))
    net = load_local_net(local_net_file)
    images = torch.rand(3, 3, 256, 256)
    stage = module.fine_tune_stage(
        net, teacher, images, DistillSettings(steps=1, batch_size=4), torch.device("cpu"), shrink=4
    )
    stage.step(torch.Generator().manual_seed(0))
    assert seen[0].shape == (4, 3, 64, 64)
    means = [image.mean() for image in images]
    assert min(abs(seen[0][0].mean() - mean) for mean in means) < 1e-5  # shrunk, not cut
