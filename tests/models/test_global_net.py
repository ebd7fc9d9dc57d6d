import pytest
import torch
from torch import nn

from glance_ext.data.grid import patch_grid
from glance_ext.models.global_net import GlobalNet, hole_masks


@pytest.fixture(scope="module")
def net() -> GlobalNet:
    torch.manual_seed(0)
    return GlobalNet(8).eval()


def test_the_sizes_close_layer_by_layer(net: GlobalNet) -> None:
    shapes: list[tuple[int, ...]] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out[0].shape)))
        for layer in (net.stem, net.pool, *net.layers)
    ]
    with torch.no_grad():
        net(torch.rand(1, 3, 256, 256), torch.ones(256, 256, dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    channels = [16, 16, 32, 32, 64, 64, 128, 128, 8]
    sizes = [125, 62, 30, 28, 13, 11, 5, 3, 1]
    assert shapes == [(1, c, n, n) for c, n in zip(channels, sizes, strict=True)]


def test_relu_follows_every_layer_but_the_last() -> None:
    torch.manual_seed(1)
    net = GlobalNet(16)
    seen: list[torch.Tensor] = []
    for layer in (net.pool, *net.layers):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    feature = net(torch.randn(1, 3, 256, 256), torch.ones(256, 256))
    assert len(seen) == 8
    for x in seen:
        assert x.min() == 0  # cut off, not merely positive by chance
    assert feature.min() < 0


@pytest.mark.parametrize("origin", [(0, 0), (223, 223), (17, 140), (140, 17)])
def test_the_feature_does_not_know_what_is_under_the_hole(
    net: GlobalNet, origin: tuple[int, int]
) -> None:
    row, column = origin
    images = torch.randn(1, 3, 256, 256)
    mask = hole_masks(torch.tensor([origin]), 33, (256, 256))
    hidden = images.clone()
    hidden[:, :, row : row + 33, column : column + 33] = float("nan")
    other = images.clone()
    other[:, :, row : row + 33, column : column + 33] = 1e6
    with torch.no_grad():
        expected = net(images, mask)
        assert torch.equal(net(hidden, mask), expected)
        assert torch.equal(net(other, mask), expected)


def test_the_feature_knows_what_is_around_the_hole(net: GlobalNet) -> None:
    images = torch.randn(1, 3, 256, 256)
    mask = hole_masks(torch.tensor([[100, 60]]), 33, (256, 256))
    with torch.no_grad():
        expected = net(images, mask)
        for row, column in ((99, 70), (133, 70), (110, 59), (110, 93)):  # touching the hole
            changed = images.clone()
            changed[:, :, row, column] += 3
            assert not torch.equal(net(changed, mask), expected), (row, column)


def test_each_image_has_its_own_mask(net: GlobalNet) -> None:
    images = torch.randn(3, 3, 256, 256)
    masks = hole_masks(torch.tensor([[0, 0], [50, 200], [223, 10]]), 33, (256, 256))
    with torch.no_grad():
        together = net(images, masks)
        alone = torch.cat([net(images[i : i + 1], masks[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_new_network_neither_fades_nor_explodes() -> None:
    torch.manual_seed(0)
    net = GlobalNet()
    with torch.no_grad():
        feature = net(torch.randn(4, 3, 256, 256), torch.ones(256, 256))
    assert 0.05 < feature.std() < 20
    assert all(not m.bias.any() for m in net.modules() if isinstance(m, nn.Conv2d))


def test_another_image_size_is_refused(net: GlobalNet) -> None:
    with pytest.raises(ValueError, match="expected images of 256x256 pixels, got 300x280"):
        net(torch.rand(1, 3, 300, 280), torch.ones(300, 280))


def test_hole_masks_are_zero_on_rows_and_columns_in_that_order() -> None:
    origins = torch.tensor([[0, 30], [7, 2], [19, 39]])
    masks = hole_masks(origins, 5, (24, 44))
    assert masks.shape == (3, 1, 24, 44)
    assert masks.dtype == torch.bool
    for mask, (row, column) in zip(masks, origins.tolist(), strict=True):
        expected = torch.ones(24, 44, dtype=torch.bool)
        expected[row : row + 5, column : column + 5] = False
        assert torch.equal(mask[0], expected)


def with_biases(features: int) -> GlobalNet:
    """A new network whose biases are not zero, so that a bias at a wrong cell shows."""
    torch.manual_seed(2)
    net = GlobalNet(features).eval()
    for name, value in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.2)
    return net


def assert_features_equal_patch_by_patch(
    net: GlobalNet, images: torch.Tensor, origins: torch.Tensor, patch: int, some: int = 40
) -> None:
    """Every hole's feature against a masked pass of its own, on ``some`` of the holes."""
    size = (images.shape[-2], images.shape[-1])
    dtype = images.dtype
    with torch.no_grad():
        features = net.shared_features(images, net.plan(origins, patch, size, dtype=dtype))
        assert features.shape == (len(images), len(origins), net.features)
        last = len(origins) - 1
        corners = [0, last, int((origins[:, 0] == 0).sum()) - 1]
        picks = torch.cat((torch.tensor(corners), torch.randperm(len(origins))[:some]))
        masks = hole_masks(origins[picks], patch, size)
        for image, found in zip(images, features, strict=True):
            expected = torch.cat(
                [net(image[None].expand(len(m), -1, -1, -1), m) for m in masks.split(8)]
            )
            error = (found[picks] - expected).abs().max() / expected.abs().max()
            assert float(error) <= (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("grid", ["paper", "4", "7"])
def test_shared_features_equal_masked_passes(grid: str) -> None:
    images = torch.randn(1, 3, 256, 256)
    assert_features_equal_patch_by_patch(with_biases(32), images, patch_grid(grid).origins, 33)


@pytest.mark.parametrize(("size", "patch"), [((256, 256), 17), ((262, 257), 65), ((259, 270), 33)])
def test_shared_features_equal_masked_passes_for_other_sizes(
    size: tuple[int, int], patch: int
) -> None:
    random = torch.Generator().manual_seed(3)
    last = torch.tensor(size) - patch
    origins = (torch.rand(60, 2, generator=random) * (last + 1)).long()
    origins[0], origins[-1] = torch.zeros(2), last
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    net = with_biases(8).double()
    assert_features_equal_patch_by_patch(net, images, origins, patch, some=10)


def test_shared_features_of_a_wrong_image_size_are_an_error() -> None:
    net = GlobalNet(8)
    plan = net.plan(torch.tensor([[0, 0]]), 33, (384, 384))
    with pytest.raises(ValueError, match="expected images of 256x256 pixels, got 384x384"):
        net.shared_features(torch.zeros(1, 3, 384, 384), plan)
