import pytest
import torch
from torch import nn

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
