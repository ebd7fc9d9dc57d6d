"""``glance-ext reproduce`` on small trees in the data sets' own layouts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glance_ext.data.cifar import CLASSES
from glance_ext.data.patches import Enlarged
from glance_ext.engine import cifar, reproduce
from glance_ext.engine.detector import Detector
from glance_ext.engine.distill import load_local_net
from glance_ext.engine.evaluate import METRIC_NAMES
from glance_ext.engine.paper import paper_table, row_key
from glance_ext.engine.settings import preset
from glance_ext.errors import Interrupted
from glance_ext.models.glance import Glance
from glance_ext.models.local_net import LocalNet
from tests.cli.conftest import Run
from tests.data import trees
from tests.engine.test_residuals import RAW

Tree = Callable[[Path], Path]
SHARED = Path(__file__).resolve().parents[2].parent / "shared"


@pytest.fixture
def options(local_net: Path) -> list[object]:
    return ["--preset", "quick", "--steps", 2, "--batch-size", 4, "--local-net", local_net]


def row(output: str, name: str) -> list[str]:
    (line,) = [x for x in output.splitlines() if x.split("  ")[0] == name]
    return line.split()[1:]


@pytest.mark.parametrize(
    ("tree", "dataset", "names"),
    [
        (trees.mvtec, "mvtec", ["bottle", "metal_nut"]),
        (trees.visa, "visa", ["candle", "pcb1"]),
        (trees.btad, "btad", ["01", "03"]),
        (trees.mvtec_ad_2, "mvtec-ad-2", ["can"]),
    ],
)
def test_all_categories_are_run_and_kept(
    tree: Tree, dataset: str, names: list[str], run: Run, options: list[object], tmp_path: Path
) -> None:
    root, output, file = tree(tmp_path / "data"), tmp_path / "out", tmp_path / "r.json"
    call = ["reproduce", dataset, root, "-o", output, "--grid", 33, *options, "--json", file]
    result = run(*call)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert json.loads((output / "results.json").read_text()) == content
    assert list(content["results"]) == names
    limit = 0.05 if dataset == "mvtec-ad-2" else 0.3
    assert content["metadata"]["pro_limit"] == limit
    for name in names:
        kept = json.loads((output / name / "result.json").read_text())
        assert tuple(kept["metrics"]) == METRIC_NAMES
        assert kept["metrics"] == content["results"][name]
        assert kept["failed"] == []
        assert kept["seconds"]["train"] > 0
        assert row(result.stdout, name)[0] == f"{kept['metrics']['pixel_AUPRO']:.3f}"
        assert sorted(p.name for p in (output / name).iterdir()) == [
            "model.safetensors",
            "result.json",
        ]
    values = [content["results"][name]["pixel_AUPRO"] for name in names]
    assert content["mean"]["pixel_AUPRO"] == pytest.approx(sum(values) / len(values))
    assert row(result.stdout, "mean")[0] == f"{content['mean']['pixel_AUPRO']:.3f}"
    assert ("paper" in content) == (dataset == "mvtec")
    times = {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")}
    again = run(*call)
    assert again.exit_code == 0
    assert [f"{name}: done before" in again.stdout for name in names] == [True] * len(names)
    assert times == {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")}
    assert json.loads(file.read_text()) == content


def test_the_papers_columns_stand_beside(run: Run, options: list[object], tmp_path: Path) -> None:
    root = trees.mvtec(tmp_path / "data")
    (root / "bottle").rename(root / "gadget")  # not in the paper
    output = tmp_path / "out"
    result = run("reproduce", "mvtec", root, "-o", output, "--grid", 33, *options)
    assert result.exit_code == 0
    published = paper_table("mvtec")["metal_nut"]
    cells = [f"{value:.3f}" for value in published.values()]
    assert row(result.stdout, "metal_nut")[3:] == cells
    assert cells[-1] == "0.967"  # the method's own
    assert row(result.stdout, "gadget")[3:] == ["n/a"] * len(cells)
    assert row(result.stdout, "mean")[3:] == cells  # of the rows that have some
    content = json.loads((output / "results.json").read_text())
    assert content["paper"] == {"metal_nut": published}


def test_one_category_is_chosen(run: Run, options: list[object], tmp_path: Path) -> None:
    root = trees.mvtec(tmp_path)
    call = ["reproduce", "mvtec", root, "-o", tmp_path / "out", "--grid", 33, *options]
    result = run(*call, "--category", "metal_nut")
    assert result.exit_code == 0
    assert not (tmp_path / "out" / "bottle").exists()
    result = run(*call, "--category", "screw")
    assert result.exit_code == 2
    assert "expected one of bottle, metal_nut" in result.stderr


def test_a_broken_category_ends_no_other(run: Run, options: list[object], tmp_path: Path) -> None:
    root = trees.mvtec(tmp_path / "data")
    for path in (root / "bottle" / "test").rglob("*.png"):
        path.unlink()
    (root / "metal_nut" / "test" / "bent" / "000.png").write_text("no image")
    (root / "metal_nut" / "ground_truth" / "bent" / "001_mask.png").unlink()
    (root / "metal_nut" / "train" / "good" / "001.png").write_text("no image")
    output = tmp_path / "out"
    result = run("reproduce", "mvtec", root, "-o", output, "--grid", 33, *options)
    assert result.exit_code == 1
    assert "bottle: left out: " in result.stderr
    assert "expected test images" in result.stderr
    assert result.stderr.splitlines()[-2] == "glance-ext: left out: bottle (see above)"
    assert "3 files could not be used" in result.stderr
    content = json.loads((output / "results.json").read_text())
    assert list(content["results"]) == ["metal_nut"]
    assert len(json.loads((output / "metal_nut" / "result.json").read_text())["failed"]) == 3
    assert row(result.stdout, "metal_nut")[0] == "n/a"  # no anomalous image is left


def test_nothing_that_can_be_run_is_an_error(
    run: Run, options: list[object], tmp_path: Path
) -> None:
    root = trees.btad(tmp_path)
    for path in root.glob("*/train/ok/*"):
        path.unlink()
    result = run("reproduce", "btad", root, "-o", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "none of 01, 03 could be run" in result.stderr
    result = run("reproduce", "btad", tmp_path / "missing", "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "found no such folder" in result.stderr


def test_an_interrupted_run_goes_on(
    run: Run, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, output = trees.mvtec(tmp_path / "data"), tmp_path / "out"
    call = ["reproduce", "mvtec", root, "-o", output, "--grid", 33, *options]
    measure = reproduce.evaluate

    def stop(results, *, folder, **rest):
        if folder.name == "metal_nut":
            raise Interrupted("stopped")
        return measure(results, folder=folder, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "evaluate", stop)
        assert run(*call).exit_code == 130
    assert list(json.loads((output / "results.json").read_text())["results"]) == ["bottle"]
    model = (output / "metal_nut" / "model.safetensors").stat().st_mtime_ns
    result = run(*call)
    assert result.exit_code == 0
    assert "bottle: done before" in result.stdout
    assert "metal_nut: begins" in result.stdout
    assert (output / "metal_nut" / "model.safetensors").stat().st_mtime_ns == model
    kept = json.loads((output / "metal_nut" / "result.json").read_text())
    assert kept["seconds"]["train"] is None  # it was trained by the run before


def test_interrupted_training_is_resumed(
    run: Run, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, output = trees.mvtec(tmp_path / "data"), tmp_path / "out"
    seen = []
    begin = reproduce.train

    def watched(*args, **rest):
        seen.append(rest["resume"])
        if len(seen) == 1:
            (output / "bottle").mkdir()
            (output / "bottle" / "training.safetensors").write_text("state")
            raise Interrupted("stopped")
        (output / "bottle" / "training.safetensors").unlink(missing_ok=True)
        return begin(*args, **rest)

    monkeypatch.setattr(reproduce, "train", watched)
    call = ["reproduce", "mvtec", root, "-o", output, "--grid", 33, *options]
    assert run(*call).exit_code == 130
    run(*call)
    assert seen == [False, True, False]


def test_results_of_other_settings_are_not_mixed(
    run: Run, options: list[object], tmp_path: Path
) -> None:
    root, output = trees.btad(tmp_path / "data"), tmp_path / "out"
    call = ["reproduce", "btad", root, "-o", output, *options, "--category", "01"]
    assert run(*call, "--grid", 33).exit_code == 0
    result = run(*call, "--grid", 30)
    assert result.exit_code == 1
    assert "01/result.json: expected a result of the same settings" in result.stderr
    assert "found grid 33 instead of 30" in result.stderr
    (output / "01" / "result.json").unlink()
    result = run(*call, "--grid", 30)
    assert "01/model.safetensors: expected a model of the same settings" in result.stderr
    (output / "01" / "result.json").write_text("{")
    result = run(*call, "--grid", 33)
    assert "01/result.json: expected a result, cannot read it" in result.stderr


def test_a_missing_local_net_is_a_wrong_call(run: Run, tmp_path: Path) -> None:
    root = trees.btad(tmp_path)
    result = run("reproduce", "btad", root, "-o", tmp_path / "o", "--local-net", tmp_path / "no")
    assert result.exit_code == 2
    assert "--local-net: expected fine, deep or a file" in result.stderr


# ---------------------------------------------------------------- CIFAR-10


@pytest.mark.parametrize("tree", [trees.cifar_batches, trees.cifar_folders])
def test_one_class_cifar(tree: Tree, run: Run, options: list[object], tmp_path: Path) -> None:
    root, output, file = tree(tmp_path / "data"), tmp_path / "out", tmp_path / "r.json"
    call = ["reproduce", "cifar10", root, "-o", output, *options, "--json", file]
    result = run(*call, "--class", "cat", "--class", "frog")
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert list(content["results"]) == ["cat", "frog"]
    identity = content["metadata"]
    assert {key: identity[key] for key in cifar.SETTING} == cifar.SETTING
    assert identity["positions"] == identity["grid"] == "9"
    assert (identity["distortion"], identity["head_steps"]) == ("stain", 0)  # not in this preset
    kept = json.loads((output / "cat" / "result.json").read_text())
    assert kept["images"] == 20
    assert list(kept["per_class"]) == [name for name in CLASSES if name != "cat"]
    # as many images of every class: the AUROC of all is the mean of those of the pairs
    mean = sum(kept["per_class"].values()) / 9
    assert kept["metrics"]["image_AUROC"] == pytest.approx(mean)
    cells = row(result.stdout, "cat")
    assert cells[0] == f"{kept['metrics']['image_AUROC']:.3f}"
    assert cells[1:] == [f"{value:.3f}" for value in paper_table("cifar10")["cat"].values()]
    again = run(*call, "--class", "cat")
    assert "cat: done before" in again.stdout
    other = run(*call, "--class", "cat", "--image-score", "max")
    assert "found image_score mean instead of max" in other.stderr


def test_the_default_preset_of_cifar_is_short(
    run: Run, local_net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trees.cifar_folders(tmp_path)
    plans = []
    figures = {"metrics": {"image_AUROC": 0.5}}
    monkeypatch.setattr(
        cifar.OneClass, "run", lambda self, plan, *rest: plans.append(plan) or figures
    )
    call = ["reproduce", "cifar10", root, "--class", "cat"]
    run(*call, "-o", tmp_path / "0")
    run(*call, "-o", tmp_path / "1", "--steps", 7, "--grid", 3, "--local-net", local_net)
    run(*call, "-o", tmp_path / "2", "--preset", "paper")
    short, changed, paper = (plan.settings.to_json() for plan in plans)
    chosen = {**cifar.SETTING, **cifar.SCHEDULE}
    assert {key: short[key] for key in chosen} == chosen
    assert (changed["steps"], changed["grid"], changed["positions"]) == (7, "3", "3")
    assert [plan.local_net for plan in plans] == [None, local_net, None]
    assert (paper["steps"], paper["positions"], paper["distortion"]) == (
        200_000,
        "uniform",
        "stain",
    )


def test_local_features_of_test_images_are_kept_between_classes_of_one_local_net(
    run: Run, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trees.cifar_folders(tmp_path / "data")
    dense, batches = LocalNet.dense, []
    monkeypatch.setattr(
        LocalNet, "dense", lambda self, x, plan: batches.append(len(x)) or dense(self, x, plan)
    )
    call = ["reproduce", "cifar10", root, *options, "--positions", "uniform"]
    run(*call, "-o", tmp_path / "both", "--class", "cat", "--class", "frog")
    tested = [count for count in batches if count > 1]  # calibration is image by image
    assert sum(tested) == 20
    run(*call, "-o", tmp_path / "alone", "--class", "frog")
    figures = [
        json.loads((tmp_path / name / "frog" / "result.json").read_text())
        for name in ("both", "alone")
    ]
    assert figures[0]["metrics"] == figures[1]["metrics"]
    assert figures[0]["per_class"] == figures[1]["per_class"]


def test_scores_take_known_features_and_no_others(local_net: Path) -> None:
    net = load_local_net(local_net).local_net
    torch.manual_seed(0)
    model = Glance(net, patch_scale=6, whiten=True, whiten_over="image")
    detector = Detector(model, replace(RAW, grid="9", image_score="mean"))
    images = torch.from_numpy(trees.cifar_pixels("test", 1, 11))
    known: dict[int, torch.Tensor] = {}
    expected = cifar.scores(detector, images)
    assert expected.dtype == torch.float64
    assert torch.equal(cifar.scores(detector, images, known=known), expected)
    assert [len(part) for part in known.values()] == [8, 3]
    one_class = cifar.OneClass.__new__(cifar.OneClass)
    one_class._test, one_class._identity, one_class._local = (images, images), None, {}
    kept = one_class._known(detector)
    kept.update(known)
    assert one_class._known(detector) is kept
    with torch.no_grad():
        next(net.parameters()).add_(1e-3)  # as fine-tuning would
    assert one_class._known(detector) == {}
    maps = detector.score_maps(Enlarged(images, (256, 256))[:])
    one_by_one = [detector.image_score(found) for found in maps.double()]
    assert cifar.scores(detector, images).tolist() == pytest.approx(one_by_one, rel=1e-3)


def test_all_ten_classes_run_by_default(
    run: Run, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trees.cifar_folders(tmp_path)
    monkeypatch.setattr(
        cifar.OneClass, "run", lambda self, plan, name, progress: {"metrics": {"image_AUROC": 0.5}}
    )
    result = run("reproduce", "cifar10", root, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(content["results"]) == list(CLASSES)
    assert content["paper_mean"]["Glance"] == pytest.approx(0.705, abs=1e-3)


def test_wrong_calls_of_cifar_are_named(run: Run, options: list[object], tmp_path: Path) -> None:
    root = trees.cifar_folders(tmp_path)
    for extra, message in (
        (["--class", "plane"], "--class: expected one of airplane"),
        (["--tile"], "--tile: expected images of 256x256 or more"),
    ):
        result = run("reproduce", "cifar10", root, "-o", tmp_path / "out", *options, *extra)
        assert result.exit_code == 2
        assert message in result.stderr
    result = run("reproduce", "cifar10", tmp_path / "test", "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "expected CIFAR-10" in result.stderr


# ---------------------------------------------------------------- tables


def test_the_papers_tables_have_the_means_they_state() -> None:
    for name, rows in (("mvtec", 15), ("cifar10", 10)):
        table = paper_table(name)
        assert len(table) == rows + 1
        body = [row["Glance"] for key, row in table.items() if key != "mean"]
        assert sum(body) / rows == pytest.approx(table["mean"]["Glance"], abs=2e-3)
    assert [row_key(name) for name in CLASSES] == list(paper_table("cifar10"))[:-1]
    assert paper_table("visa") == {}


@pytest.mark.parametrize("name", ["table1_mvtec_pro.csv", "table3_cifar10_auroc.csv"])
def test_the_tables_are_as_they_were_handed_over(name: str) -> None:
    original = SHARED / "paper" / name
    if not original.exists():
        pytest.skip("needs ../shared/paper")
    shipped = Path(reproduce.__file__).resolve().parents[1] / "data" / name
    assert shipped.read_bytes() == original.read_bytes()


# ---------------------------------------------------------------- what is held out


def test_mvtec_ad_2_is_calibrated_on_its_validation_images(
    run: Run, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trees.mvtec_ad_2(tmp_path / "data")
    for i in range(1, 3):
        trees.draw(root / "can" / "validation" / "good" / f"{i:03}_regular.png")
    seen = []
    begin = reproduce.train
    monkeypatch.setattr(reproduce, "train", lambda *a, **k: seen.append(begin(*a, **k)) or seen[-1])
    call = ["reproduce", "mvtec-ad-2", root, "-o", tmp_path / "out", "--grid", 33, *options]
    assert run(*call).exit_code == 0
    assert (seen[0].images, seen[0].held_out) == (3, 3)  # none of the training images is held out
    assert len(seen[0].detector.calibration.held_out_scores) == 3


def test_no_image_of_cifar_is_both_learnt_and_held_out() -> None:
    images = torch.from_numpy(trees.cifar_pixels("train", 3, 20))
    normal = cifar.normal_images(images, preset("quick", seed=5))
    assert (normal.count, len(normal.held_out)) == (16, 4)
    learnt = {image.tobytes() for image in normal.images.small.numpy()}
    held = [small for small in images if small.numpy().tobytes() not in learnt]
    assert len(learnt) == 16
    expected = Enlarged(torch.stack(held), (256, 256))
    assert all(torch.equal(a, expected[i]) for i, a in enumerate(normal.held_out))
    other = cifar.normal_images(images, preset("quick", seed=6))
    assert other.fingerprint != normal.fingerprint
