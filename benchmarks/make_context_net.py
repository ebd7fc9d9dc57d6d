"""Makes the network that ships for the memory: glance_ext/weights/context_net.safetensors.

It is ResNet-18 as torchvision trained it on ImageNet, up to ``layer3``, with its batch norms folded
into the convolutions; nothing is trained here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from glance_ext.engine.checkpoint import prefixed, save_checkpoint
from glance_ext.engine.memory import CONTEXT_NET_KIND, packaged_context_net
from glance_ext.models.context_net import ContextNet
from glance_ext.models.teacher import load_teacher

LAYERS = "layer1+layer2+layer3"


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    """Weight and bias of a convolution with the batch norm behind it, computed in float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = convolution.weight.double() * scale[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return {"weight": weight.float(), "bias": bias.float()}


@torch.no_grad()
def from_resnet(network: nn.Module) -> ContextNet:
    """The same network up to ``layer3``, from timm's or torchvision's ``resnet18``."""
    pairs = {"stem": (network.conv1, network.bn1)}
    for name in LAYERS.split("+"):
        for index, block in enumerate(getattr(network, name)):
            pairs[f"{name}.{index}.conv1"] = (block.conv1, block.bn1)
            pairs[f"{name}.{index}.conv2"] = (block.conv2, block.bn2)
            if block.downsample is not None:
                pairs[f"{name}.{index}.shortcut"] = tuple(block.downsample)
    net = ContextNet()
    net.load_state_dict(
        {
            f"{place}.{part}": tensor
            for place, pair in pairs.items()
            for part, tensor in folded(*pair).items()
        }
    )
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="of ResNet-18; without, timm downloads them")
    parser.add_argument("--output", type=Path, default=packaged_context_net())
    options = parser.parse_args()
    teacher = load_teacher("resnet18", layer=LAYERS, weights=options.weights)
    net = from_resnet(teacher.network.network)
    save_checkpoint(
        options.output,
        CONTEXT_NET_KIND,
        prefixed(net, "context_net"),
        {"teacher": "resnet18", "layer": LAYERS},
    )


if __name__ == "__main__":
    main()
