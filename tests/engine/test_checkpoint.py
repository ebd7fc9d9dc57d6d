import json
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from glance_ext.engine import checkpoint
from glance_ext.engine.checkpoint import load_checkpoint, load_module, prefixed, save_checkpoint
from glance_ext.errors import CheckpointError, OutputError

METADATA: dict[str, Any] = {
    "lambda_s": 0.1 + 0.2,
    "names": ["a", "猫"],
    "none": None,
    "deep": {"x": 1},
}


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn((2, 3), generator=g),
        "half": torch.randn((3,), generator=g).half(),
        "bfloat": torch.randn((2,), generator=g).bfloat16(),
        "step": torch.tensor(7, dtype=torch.int64),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit by bit, NaN included."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].numpy(force=True).tobytes() == b[k].numpy(force=True).tobytes()
        if a[k].dtype != torch.bfloat16
        else torch.equal(a[k], b[k])
        for k in a
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "a.safetensors", "model", tensors(), METADATA)
    return tmp_path / "a.safetensors"


def refusal(path: Path, kind: str = "model") -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_what_is_saved_is_loaded_bit_by_bit(file: Path) -> None:
    loaded, metadata = load_checkpoint(file, "model")
    assert same(loaded, tensors())
    assert metadata == METADATA
    assert os.listdir(file.parent) == [file.name]


def test_tensors_of_any_layout_are_saved_by_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4).requires_grad_()
    views = {"t": base.transpose(0, 2), "s": base[:, ::2], "e": base[:1].expand(5, 3, 4)}
    save_checkpoint(tmp_path / "a", "model", views, {})
    loaded, _ = load_checkpoint(tmp_path / "a", "model")
    assert all(torch.equal(loaded[k], v) for k, v in views.items())


def test_a_file_cut_at_any_length_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert re.search("cut short|of another kind", refusal(file)), length


def test_a_file_with_any_byte_flipped_is_refused_or_says_the_same(file: Path) -> None:
    whole = file.read_bytes()
    same_content = 0
    for position in range(len(whole)):
        for bit in (0, 3, 5):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                loaded, metadata = load_checkpoint(file, "model")
            except CheckpointError:
                continue
            same_content += 1
            assert same(loaded, tensors()), position
            assert metadata == METADATA, position
    assert same_content < 0.02 * 3 * len(whole)


def test_bytes_too_many_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    refusal(file)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    assert "no such file" in refusal(tmp_path)


def test_a_foreign_safetensors_file_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.rand(2)}, tmp_path / "a", metadata={"format": "pt"})
    assert "not one that glance-ext wrote" in refusal(tmp_path / "a")
    save_file({"a": torch.rand(2)}, tmp_path / "b")
    assert "not one that glance-ext wrote" in refusal(tmp_path / "b")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "a.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": torch.rand(2)}, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"")
    for name in "abc":
        assert "of another kind" in refusal(tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()


def test_another_kind_is_named(file: Path) -> None:
    assert "expected a checkpoint of kind 'training', got 'model'" in refusal(file, "training")


def rewrite(file: Path, **changes: Any) -> None:
    """Changes the header of a checkpoint as a careless editor would."""
    with safe_open(file, "pt") as stored:
        header = json.loads(stored.metadata()["glance_ext"])
        content = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    header.update(changes)
    header = {k: v for k, v in header.items() if v != "left out"}
    save_file(content, file, metadata={"glance_ext": json.dumps(header)})


def test_a_newer_version_is_named_with_what_to_do(file: Path) -> None:
    rewrite(file, format_version=checkpoint.FORMAT_VERSION + 1)
    message = refusal(file)
    assert f"version {checkpoint.FORMAT_VERSION + 1} is newer" in message
    assert "pip install --upgrade glance-ext" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": "two"},
        {"format_version": None},
        {"format_version": math.inf},
        {"format_version": "left out"},
        {"kind": "left out"},
        {"metadata": "left out"},
        {"metadata": [1]},
        {"metadata": {**METADATA, "lambda_s": 0.9}},
        {"sha256": "left out"},
        {"sha256": 5},
    ],
)
def test_a_changed_header_is_refused(file: Path, changes: dict[str, Any]) -> None:
    rewrite(file, **changes)
    assert "damaged" in refusal(file)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", '"format_version"'])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.rand(2)}, tmp_path / "a", metadata={"glance_ext": text})
    assert "damaged" in refusal(tmp_path / "a")


def test_a_failed_save_leaves_the_older_checkpoint(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(file, "model", {"other": torch.rand(3)}, {})
    assert same(load_checkpoint(file, "model")[0], tensors())
    assert os.listdir(file.parent) == [file.name]


def test_modules_load_strictly_by_prefix(tmp_path: Path) -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    state = {**prefixed(module, "net"), **prefixed(other, "nets")}
    fresh = nn.Linear(2, 3)
    load_module(fresh, state, "net", "file")
    assert torch.equal(fresh.weight, module.weight)
    assert torch.equal(fresh.bias, module.bias)
    for wrong in (nn.Linear(3, 3), nn.Linear(2, 3, bias=False), nn.Bilinear(2, 3, 4)):
        with pytest.raises(CheckpointError, match="file: the tensors of 'net' do not fit: "):
            load_module(wrong, state, "net", "file")
