import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from glance_ext.errors import OutputError
from glance_ext.files import atomic_write, ensure_folder, write_json


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_result_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "result.bin"
    with atomic_write(target) as stream:
        stream.write(b"part one ")
        stream.flush()
        assert not target.exists()
        stream.write(b"part two")
    assert contents(target.parent) == {"result.bin": b"part one part two"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_what_goes_wrong_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "result").write_bytes(b"old")

    def half() -> None:
        with atomic_write(tmp_path / "result") as stream:
            stream.write(b"new, but")
            raise error

    with pytest.raises(error):
        half()
    assert contents(tmp_path) == {"result": b"old"}


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at != "write":
        monkeypatch.setattr(os, at, full)

    def write() -> None:
        with atomic_write(tmp_path / "new" / "result") as stream:
            stream.write(b"x")
            if at == "write":
                full()

    with pytest.raises(OutputError, match=r"new/result: cannot write the file: No space left"):
        write()
    assert contents(tmp_path / "new") == {}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "result") as stream:
            stream.write(b"x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == mode


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(OutputError, match=r"file/result: cannot write the file"):
        write_json(tmp_path / "file" / "result", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"folder: cannot write the file: Is a directory"):
        write_json(tmp_path / "folder", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "n" * 255
    with atomic_write(tmp_path / name) as stream:
        stream.write(b"x")
    assert contents(tmp_path) == {name: b"x"}
    with (
        pytest.raises(OutputError, match="File name too long"),
        atomic_write(tmp_path / (name * 2)),
    ):
        pass


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to("real/file")
    with atomic_write(tmp_path / "link", "w") as stream:
        stream.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_a_pipe_is_written_to_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(10)
    assert received
    assert json.loads(received[0]) == {"a": 1}
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_is_written_to_not_replaced() -> None:
    before = os.stat("/dev/full")
    with pytest.raises(OutputError, match="/dev/full: cannot write the file: No space left"):
        write_json("/dev/full", [1])
    assert os.stat("/dev/full").st_rdev == before.st_rdev
    assert not [name for name in os.listdir("/dev") if name.startswith(".glance-")]


def test_text_is_utf8_without_translated_newlines(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "text", "w") as stream:
        stream.write("é\n\r\n猫")
    assert (tmp_path / "text").read_bytes() == "é\n\r\n猫".encode()


def test_a_file_name_that_is_no_utf8_survives_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_json(tmp_path / "a.json", {"path": name, "猫": 1.5})
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert json.loads(text) == {"path": name, "猫": 1.5}
    assert "猫" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_no_nan(tmp_path: Path, value: float) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"metric": value})
    assert contents(tmp_path) == {"a.json": b"old"}


def test_a_folder_for_results_is_made_and_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_folder(tmp_path / "a" / "b")
    ensure_folder(tmp_path / "a" / "b")
    assert contents(tmp_path / "a" / "b") == {}
    (tmp_path / "file").touch()
    for wrong in ("file", "file/below"):
        with pytest.raises(OutputError, match=f"{wrong}: cannot write to this folder"):
            ensure_folder(tmp_path / wrong)
    if os.path.isdir("/proc/self"):
        with pytest.raises(OutputError, match="/proc/self: cannot write to this folder"):
            ensure_folder("/proc/self")
