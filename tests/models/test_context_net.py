"""The pretrained network of the memory: its layers, and what it says of a patch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.engine.memory import load_context_net
from glance_ext.models.context_net import ContextNet
from glance_ext.models.glance import Glance
from glance_ext.models.local_net import LocalNet
from glance_ext.models.normalisation import normalise
from tests.scripts import script


@pytest.fixture(scope="module")
def net() -> ContextNet:
    net = ContextNet()
    load_context_net(net)
    return net


def image(side: int = 256, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return normalise(F.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)).to(dtype)


def test_it_is_resnet18_with_its_batch_norms_folded() -> None:
    timm = pytest.importorskip("timm")
    make = script("make_context_net")
    network = timm.create_model("resnet18", pretrained=False).double().eval()
    random = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                values.copy_(torch.rand(values.shape, generator=random) + 0.5)
    x = image(96, dtype=torch.float64)
    with torch.no_grad():
        y = network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(x)))))
        z = network.layer2(y)
        expected_maps = (y, z, network.layer3(z))
        for found, expected in zip(
            make.from_resnet(network).double()(x), expected_maps, strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_packaged_weights_are_trained(net: ContextNet) -> None:
    """Filters that nobody trained are noise: neighbouring weights of these are alike."""
    weight = net.stem.weight
    beside = (weight[..., 1:] * weight[..., :-1]).sum() / weight.square().sum()
    assert float(beside) > 0.1
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("side", [256, 255, 42, 36])
def test_a_patch_has_what_the_layers_have_at_its_centre(net: ContextNet, side: int) -> None:
    """Against a plain loop over the cells around the centre, in float64."""
    x = image(side, dtype=torch.float64)
    wide = ContextNet().double()
    wide.load_state_dict(net.state_dict())
    last = side - 33
    origins = torch.tensor([[0, 0], [last, last], [last // 2, 1], [last, 0], [3, last // 3]])
    found = wide.patch_features(x, origins)
    assert found.shape == (1, 5, 64 + 128 + 256)
    assert net.features == 448
    maps = wide(x)
    for index, origin in enumerate(origins):
        expected = []
        for cells, stride in zip(maps, ContextNet.STRIDES, strict=True):
            height, width = cells.shape[-2:]
            total = torch.zeros(cells.shape[1], dtype=torch.float64)
            y, x_ = ((origin + 16) / stride).tolist()
            for row in (int(y), int(y) + 1):
                for column in (int(x_), int(x_) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x_ - column))
                    if weight == 0:
                        continue
                    around = cells[
                        0,
                        :,
                        max(0, row - 1) : min(height, row + 2),
                        max(0, column - 1) : min(width, column + 2),
                    ]
                    total += weight * around.mean((1, 2))
            expected.append(total)
        torch.testing.assert_close(found[0, index], torch.cat(expected), atol=1e-10, rtol=1e-10)


def test_what_lies_beyond_its_reach_changes_nothing(net: ContextNet) -> None:
    """211 pixels of layer3 and 99 of layer2, with the cells beside and between them."""
    x = image()
    origin = torch.tensor([[112, 112]])
    before = net.patch_features(x, origin)
    far = x.clone()
    far[..., : 128 - 66, :] = 1
    far[..., 128 + 66 :, :] = 1
    far[..., : 128 - 66] = 1
    far[..., 128 + 66 :] = 1
    assert torch.equal(net.patch_features(far, origin)[..., :192], before[..., :192])
    assert not torch.allclose(net.patch_features(far, origin)[..., 192:], before[..., 192:])
    near = x.clone()
    near[..., 112:145, 112:145] += 0.5
    assert not torch.allclose(net.patch_features(near, origin), before)
    large = image(512)
    far = large.clone()
    far[..., : 256 - 138, :] = 1
    far[..., 256 + 138 :, :] = 1
    far[..., : 256 - 138] = 1
    far[..., 256 + 138 :] = 1
    origin = torch.tensor([[240, 240]])
    assert torch.equal(net.patch_features(far, origin), net.patch_features(large, origin))


def test_each_image_may_have_patches_of_its_own(net: ContextNet) -> None:
    both = torch.cat((image(seed=1), image(seed=2)))
    origins = torch.tensor([[[0, 7], [40, 99]], [[200, 3], [223, 223]]])
    found = net.patch_features(both, origins)
    for index in range(2):
        alone = net.patch_features(both[index : index + 1], origins[index])
        torch.testing.assert_close(found[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_features_are_wide_whatever_the_network_computes_in(net: ContextNet) -> None:
    origins = torch.tensor([[0, 0], [100, 50]])
    exact = net.patch_features(image(), origins)
    low = ContextNet().to(torch.bfloat16)
    low.load_state_dict(net.state_dict())
    found = low.patch_features(image(dtype=torch.bfloat16), origins)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_a_model_asks_for_what_its_memory_compares() -> None:
    for wrong in ({}, {"memory_size": 3, "memory_features": 9}):
        with pytest.raises(ValueError, match="expected a memory_size above 0 and memory_features"):
            Glance(LocalNet(5, 4), memory_context=True, **wrong)
    model = Glance(LocalNet(5, 4), memory_size=3, memory_context=True)
    features = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="expected context_features for the context_net, got none"):
        model.compare(features, features)
    assert model.memory.layers == list(ContextNet.LAYERS[:2])
    assert model.context_net.features == 192


def test_the_memory_compares_two_layers_and_the_head_in_context_reads_three(
    net: ContextNet,
) -> None:
    model = Glance(LocalNet(5, 4), memory_size=3, memory_context=True, context_head=True)
    load_context_net(model.context_net)
    origins = torch.tensor([[0, 0], [100, 50]])
    raw = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    features = model.context_features(raw, origins)
    assert features.shape == (1, 2, 448)
    assert torch.equal(model.remembered(features), features[..., :192])
    near = Glance(LocalNet(5, 4), memory_size=3, memory_context=True)
    load_context_net(near.context_net)
    torch.testing.assert_close(near.context_features(raw, origins), features[..., :192])
    local = torch.rand(1, 2, 500)
    assert torch.equal(Glance(LocalNet(5, 500), memory_size=3).remembered(local), local)
    assert Glance(LocalNet(5, 4)).context_features(image(), torch.zeros(1, 2)) is None
