import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glance_ext.bench import result_file_name, validate_results
from glance_ext.bench.machine import git_commit, slug

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def example():
    row = {
        "suite": "ops",
        "case": "partial_conv2d/forward/a",
        "variant": "ours",
        "device": "cpu",
        "dtype": "float32",
        "median_ms": 1.0,
        "iqr_ms": 0.1,
        "peak_mib": 2.0,
        "max_error": 1e-6,
    }
    limit = row | {"variant": "limit", "peak_mib": None, "max_error": None}
    return {
        "metadata": {
            "suite": "ops",
            "device": "cpu",
            "dtype": "float32",
            "machine": "some-cpu-2-cores",
            "cpu": "Some CPU",
            "gpu": None,
            "cores": 2,
            "threads": 2,
            "torch": "2.14.1",
            "cuda": None,
            "python": "3.11.0",
            "glance_ext": "0.1.0",
            "git_commit": None,
            "date": "2026-01-31",
            "seed": 0,
            "quick": False,
            "shapes": {row["case"]: {}},
            "repeats": {row["case"]: {}},
            "rates": {"matrix_tflops": 0.1, "copy_gb_s": 20.0},
            "method": "as agreed",
        },
        "results": [row, limit],
    }


def test_the_example_is_valid_under_its_own_name():
    results = example()
    assert result_file_name(results) == "ops--some-cpu-2-cores--float32.json"
    validate_results(results, "ops--some-cpu-2-cores--float32.json")


def drop(*path):
    def change(results):
        place = results
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def put(value, *path):
    def change(results):
        place = results
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("metadata"), "metadata and results"),
        (put(1, "more"), "metadata and results"),
        (drop("metadata", "torch"), "torch"),
        (put("int8", "metadata", "dtype"), "dtype"),
        (put("Some CPU", "metadata", "machine"), "hyphens"),
        (put("31.1.2026", "metadata", "date"), "YYYY-MM-DD"),
        (put(0, "metadata", "rates", "copy_gb_s"), "copy_gb_s"),
        (put({}, "metadata", "shapes"), "shapes of partial"),
        (put([], "results"), "a list"),
        (drop("results", 0), "a variant ours"),
        (drop("results", 0, "iqr_ms"), "result 0 to have"),
        (put("x", "results", 0, "note"), "result 0 to have"),
        (put("other", "results", 0, "suite"), "suite ops"),
        (put("cuda", "results", 1, "device"), "device cpu"),
        (put("", "results", 0, "case"), "name its case"),
        (put(0.0, "results", 0, "median_ms"), "median_ms"),
        (put("fast", "results", 0, "median_ms"), "median_ms"),
        (put(True, "results", 0, "median_ms"), "median_ms"),
        (put(-0.1, "results", 0, "iqr_ms"), "iqr_ms"),
        (put(float("nan"), "results", 0, "peak_mib"), "peak_mib"),
        (put(None, "results", 0, "max_error"), "max_error"),
        (put(1.0, "results", 1, "peak_mib"), "limit, to have no peak_mib"),
        (put("ours", "results", 1, "variant"), "peak_mib"),
        (put(0.9, "results", 0, "p95_ms"), "p95_ms of at least its median_ms"),
        (put(None, "results", 0, "p95_ms"), "p95_ms"),
    ],
)
def test_a_broken_file_is_refused(change, message):
    results = example()
    change(results)
    with pytest.raises(ValueError, match=message):
        validate_results(results)


def test_a_row_may_say_its_95th_percentile():
    results = example()
    results["results"][0]["p95_ms"] = 1.5
    validate_results(results)


def test_a_variant_twice_is_refused():
    results = example()
    results["results"].append(copy.deepcopy(results["results"][0]))
    with pytest.raises(ValueError, match="once a case"):
        validate_results(results)


def test_another_file_name_is_refused():
    for name in ("ops-some-cpu-2-cores-float32.json", "ops--other--float32.json"):
        with pytest.raises(ValueError, match="ops--some-cpu-2-cores--float32"):
            validate_results(example(), name)


def test_results_are_committed():
    assert COMMITTED


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_have_the_agreed_form(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    validate_results(results, path.name)
    assert results["metadata"]["quick"] is False


def test_slugs_are_plain_words():
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"
    assert slug("\u00b5") == "unknown"


def test_the_commit_is_a_hash_or_unknown():
    commit = git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?", commit)


class TestGpuCheck:
    SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

    def test_it_is_a_valid_script(self):
        bash = shutil.which("bash")
        if bash is None:
            pytest.skip("needs bash")
        subprocess.run([bash, "-n", str(self.SCRIPT)], check=True)
        assert self.SCRIPT.stat().st_mode & 0o111

    def test_what_it_names_exists(self):
        text = self.SCRIPT.read_text(encoding="utf-8")
        named = set(re.findall(r"\b(?:tests|benchmarks)/[\w./*-]+|\bsetup\.py\b", text))
        assert {"setup.py", "tests/ops/test_contract.py", "benchmarks/results"} <= named
        for name in named:
            assert any(ROOT.glob(name)), name
        checked = {path for name in named for path in ROOT.glob(name)}
        on_a_device = {p for p in ROOT.glob("tests/ops/test_*.py") if "device" in p.read_text()}
        assert on_a_device
        assert on_a_device <= checked
        assert (ROOT / "glance_ext" / "__main__.py").exists()

    def run(self, tmp_path, commands, **environment):
        """Runs the script with a Python that prints what it is asked to do."""
        bash = shutil.which("bash")
        if bash is None:
            pytest.skip("needs bash")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\n{commands}\necho "$@" >&2\nexit 0\n')
        python.chmod(0o755)
        run = subprocess.run(
            [bash, str(self.SCRIPT)],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHON": str(python),
                "OUT": str(tmp_path / "out"),
                "TORCH_CUDA_ARCH_LIST": "9.0",
                "CUDA_HOME": str(tmp_path),
                **environment,
            },
            capture_output=True,
            text=True,
        )
        summary = run.stdout.split("=== summary")[1].splitlines()[1:]
        log = (tmp_path / "out" / "gpu-check.log").read_text()
        assert "\n".join(summary) in log
        return run, {line[:28].strip(): line[29:48].strip() for line in summary}

    @pytest.mark.parametrize("jobs", ["1", "4"])
    def test_it_goes_on_after_a_failed_step_and_says_so_at_the_end(self, tmp_path, jobs):
        run, outcomes = self.run(tmp_path, '[ "$1" = setup.py ] && exit 3', JOBS=jobs)
        assert run.returncode == 1
        assert outcomes["build"] == "FAILED (exit 3)"
        assert outcomes["agreement"] == outcomes["tests: cuda"] == outcomes["tests: rest"] == "ok"
        assert outcomes["memcheck: hole ops"] == "FAILED (exit 127)"
        assert "tests/engine/test_gpu_agreement.py -m cuda" in run.stdout
        assert "-m not cuda" in run.stdout
        for suite in ("ops", "detect", "train", "partial-conv"):
            for dtype in ("float32", "bfloat16"):
                assert outcomes[f"bench: {suite} {dtype}"] == "ok"
                assert f"bench {suite} --device cuda --dtype {dtype}" in run.stdout
        assert "--without nvidia-compiled" in run.stdout
        assert "gpu_profile.py --images 16" in run.stdout

    def test_parts_can_be_asked_for(self, tmp_path):
        run, outcomes = self.run(tmp_path, "", PARTS="rest")
        assert run.returncode == 0
        assert outcomes == {"device": "ok", "build": "ok", "tests: rest": "ok"}
        run, outcomes = self.run(tmp_path, "", PARTS="prof")
        assert run.returncode == 1
        assert outcomes["part prof"] == "FAILED (exit 1)"

    def test_it_ends_in_time_and_names_what_had_none(self, tmp_path):
        commands = 'case "$*" in *"bench detect"*) sleep 60;; esac'
        run, outcomes = self.run(tmp_path, commands, PARTS="numbers rest", SECONDS_AT_MOST="3")
        assert run.returncode == 1
        assert outcomes["bench: detect bfloat16"] == "out of time"
        assert outcomes["bench: ops float32"] == outcomes["tests: rest"] == "no time left"

    def test_a_proof_that_hangs_leaves_time_for_the_rest(self, tmp_path):
        commands = 'case "$*" in *agreement*) sleep 60;; esac'
        _, outcomes = self.run(tmp_path, commands, PARTS="proof rest", SECONDS_AT_MOST="6")
        assert outcomes["agreement"] == "out of time"
        assert outcomes["tests: cuda"] == "no time left"
        assert outcomes["tests: rest"] == "ok"
