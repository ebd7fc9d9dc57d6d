import pytest
import torch
from torch import nn

from glance_ext.models.local_net import (
    Decoder,
    LocalNet,
    compactness_loss,
    knowledge_loss,
)


@pytest.mark.parametrize(
    ("kernel_size", "sizes"),
    [(3, [31, 15, 11, 5, 4, 1]), (5, [29, 14, 10, 5, 4, 1])],
)
def test_the_sizes_close_layer_by_layer(kernel_size: int, sizes: list[int]) -> None:
    net = LocalNet(kernel_size, 16)
    x, seen, channels = torch.rand(2, 3, 33, 33), [], []
    for layer in net.layers:
        x = layer(x)
        if not isinstance(layer, nn.LeakyReLU):
            seen.append(x.shape[-1])
            channels.append(x.shape[1])
        else:
            assert layer.negative_slope == 0.005
    assert seen == sizes
    assert channels == [128, 128, 256, 256, 256, 16]
    assert net(torch.rand(2, 3, 33, 33)).shape == (2, 16)


@pytest.mark.parametrize(("kernel_size", "blind"), [(3, 3), (5, 1)])
def test_the_pooling_leaves_the_last_rows_and_columns_unseen(kernel_size: int, blind: int) -> None:
    torch.manual_seed(0)
    net = LocalNet(kernel_size, 8).double()
    patch = torch.randn(1, 3, 33, 33, dtype=torch.float64, requires_grad=True)
    seen = torch.zeros(33, 33)
    for feature in net(patch)[0]:
        seen += torch.autograd.grad(feature, patch, retain_graph=True)[0].abs().sum((0, 1))
    assert not seen[33 - blind :].any()
    assert not seen[:, 33 - blind :].any()
    assert seen[: 33 - blind, : 33 - blind].sum(1).all()
    assert seen[: 33 - blind, : 33 - blind].sum(0).all()
    assert seen[32 - blind, 32 - blind] > 0


def test_a_larger_input_gives_features_of_stride_4() -> None:
    net = LocalNet(5, 4)
    image = torch.rand(1, 3, 45, 41)
    with torch.no_grad():
        dense = net.layers(image)
        assert dense.shape == (1, 4, 4, 3)
        single = net(image[:, :, 8:41, 4:37])
    torch.testing.assert_close(dense[:, :, 2, 1], single, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected kernel_size 3 or 5, got 4"):
        LocalNet(4)
    with pytest.raises(ValueError, match="expected patches of 33x33 pixels, got 45x33"):
        LocalNet(5, 4)(torch.rand(1, 3, 45, 33))


def test_standardising_leaves_what_the_decoder_says() -> None:
    torch.manual_seed(0)
    net, decoder = LocalNet(5, 6).double(), Decoder(6, 9).double()
    patches = torch.randn(40, 3, 33, 33, dtype=torch.float64)
    with torch.no_grad():
        features = net(patches)
        said = decoder(features)
        mean, std = features.mean(0), features.std(0)
        net.standardise(mean, std, decoder)
        after = net(patches)
        torch.testing.assert_close(after, (features - mean) / std)
        torch.testing.assert_close(after.mean(0), torch.zeros_like(mean), atol=1e-12, rtol=0)
        torch.testing.assert_close(after.std(0), torch.ones_like(std))
        torch.testing.assert_close(decoder(after), said)


def test_knowledge_loss_is_the_mean_square() -> None:
    decoded, taught = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert float(knowledge_loss(decoded, taught)) == pytest.approx((4 + 9) / 4)


def test_compactness_is_the_mean_absolute_correlation_of_pairs() -> None:
    features = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    correlation = torch.corrcoef(features.T)
    pairs = [abs(float(correlation[i, j])) for i in range(5) for j in range(5) if i != j]
    assert float(compactness_loss(features)) == pytest.approx(sum(pairs) / len(pairs))


def test_compactness_counts_opposite_channels_as_correlated() -> None:
    channel = torch.randn(20, 1)
    assert float(compactness_loss(torch.cat((channel, -3 * channel + 1), 1))) == pytest.approx(1)


def test_compactness_of_a_dead_channel_is_finite_and_differentiable() -> None:
    features = torch.randn(8, 3)
    features[:, 1] = 2.5
    features.requires_grad_()
    loss = compactness_loss(features)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_compactness_needs_two_features() -> None:
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        compactness_loss(torch.rand(1, 4))
