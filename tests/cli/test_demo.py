import base64
import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from glance_ext import demo
from glance_ext.data import textures
from glance_ext.engine.evaluate import METRIC_NAMES
from glance_ext.engine.settings import PRESETS, TrainSettings
from tests.cli.conftest import Run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One texture, few crops, a coarse grid."""
    monkeypatch.setattr(
        demo, "write_texture_set", partial(textures.write_texture_set, train=4, good=1, each=1)
    )
    monkeypatch.setattr(demo, "run_demo", partial(demo.run_demo, textures=("brick",)))
    monkeypatch.setitem(PRESETS, "quick", TrainSettings(steps=2, batch_size=2))
    real = demo.preset
    monkeypatch.setattr(demo, "preset", lambda name, **kw: real(name, **{**kw, "grid": "33"}))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_demo_writes_a_report_with_pictures(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    result = run("demo", "-o", output, "--json", tmp_path / "demo.json")
    assert result.exit_code == 0, result.output
    page = (output / "report.html").read_text("utf-8")
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            picture.load()
            assert picture.width > 200
    assert "<h2>Brick</h2>" in page
    for kind in ("blot", "foreign", "scratch", "smear"):
        assert f"<td>{kind}</td>" in page
    content = json.loads((tmp_path / "demo.json").read_text())
    metrics = content["textures"]["brick"]["metrics"]
    assert tuple(metrics) == METRIC_NAMES
    assert all(0 <= value <= 1 for value in metrics.values())
    assert f"report: {output / 'report.html'}" in result.stdout

    again = run("demo", "-o", output)
    assert again.exit_code == 2
    assert "already there; give --overwrite" in again.stderr


@pytest.mark.usefixtures("small")
def test_a_demo_interrupted_says_nothing_of_resuming(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glance_ext.errors import Interrupted

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("go on with --resume")

    monkeypatch.setattr(demo, "train", interrupted)
    result = run("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 130
    assert "--resume" not in result.stderr


@pytest.mark.usefixtures("small")
def test_an_output_that_is_a_file_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("demo", "-o", tmp_path / "file")
    assert result.exit_code == 1
    assert "cannot write the file" in result.stderr
