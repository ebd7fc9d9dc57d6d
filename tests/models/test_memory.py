"""The memory of normal features and the coreset that it keeps."""

import pytest
import torch
import torch.nn.functional as F

from glance_ext.models.local_net import Decoder
from glance_ext.models.memory import FeatureMemory, coreset


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def normal() -> torch.Tensor:
    scales = torch.tensor([0.1, 1.0, 10.0, 3.0, 1.0, 0.5])
    return torch.randn(300, 6, generator=generator()) * scales


def test_novelty_is_the_distance_to_the_nearest_direction(normal: torch.Tensor) -> None:
    memory = FeatureMemory(40, 6)
    memory.fit(normal, generator())
    asked = torch.randn(2, 5, 6, generator=generator(1))
    spread = normal.double().std(0, correction=0)
    kept = F.normalize(normal.double() / spread, dim=-1)
    kept = kept[coreset(F.normalize(normal / spread.float(), dim=-1), 40, generator())]
    expected = torch.cdist(F.normalize(asked.double() / spread, dim=-1).flatten(0, 1), kept)
    found = memory(asked)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found.double(), expected.amin(1).reshape(2, 5), atol=1e-5, rtol=1e-5)


def test_each_layers_direction_counts_alike(normal: torch.Tensor) -> None:
    memory = FeatureMemory(400, 6, layers=(2, 4))
    memory.fit(normal, generator())
    spread = normal.double().std(0, correction=0)
    scaled = normal.double() / spread
    parts = [F.normalize(scaled[:, :2], dim=-1), F.normalize(scaled[:, 2:], dim=-1)]
    asked = torch.randn(1, 5, 6, generator=generator(1))
    of = [F.normalize(p, dim=-1) for p in (asked[0].double() / spread).split([2, 4], -1)]
    squares = sum(torch.cdist(a, b).square() for a, b in zip(of, parts, strict=True)) / 2
    torch.testing.assert_close(
        memory(asked)[0].double(), squares.amin(1).sqrt(), atol=1e-5, rtol=1e-5
    )
    # a layer may vary as much as it likes
    strong = normal * torch.tensor([1.0, 1, 9, 9, 9, 9])
    assert float(memory(strong[None]).max()) < 2e-3


def test_what_was_kept_is_not_new_whatever_its_strength(normal: torch.Tensor) -> None:
    memory = FeatureMemory(1000, 6)
    memory.fit(normal, generator())
    assert len(memory) == 300  # there were no more
    for strength in (0.1, 1.0, 7.0):
        assert float(memory(normal[None] * strength).max()) < 2e-3
    assert float(memory(-normal[:1][None])) > 0.1


def test_memory_is_asked_in_chunks(normal: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FeatureMemory(40, 6)
    memory.fit(normal, generator())
    expected = memory(normal[None])
    monkeypatch.setattr("glance_ext.models.memory._CHUNK", 40 * 7)
    # the square root makes much of the last bit near 0
    torch.testing.assert_close(memory(normal[None]), expected, atol=1e-3, rtol=1e-5)


def test_a_channel_that_never_moves_decides_nothing() -> None:
    normal = torch.randn(50, 4, generator=generator())
    normal[:, 2] = 0.25
    memory = FeatureMemory(50, 4)
    memory.fit(normal, generator())
    assert bool(memory.spread.isfinite().all())
    assert bool((memory.spread > 0).all())
    assert float(memory(normal[None]).max()) < 2e-3


def test_coreset_leaves_nothing_far_from_it() -> None:
    """Of clusters it takes one of each before a second of any; few random ones would miss some."""
    centres = torch.randn(20, 40, generator=generator()) * 10
    sizes = [400] + [3] * 19
    rows = torch.cat([c.expand(n, -1) for c, n in zip(centres, sizes, strict=True)])
    rows = rows + torch.randn(rows.shape, generator=generator(1)) * 0.01
    picks = coreset(rows, 20, generator(2))
    assert picks.unique().numel() == 20
    assert float(torch.cdist(rows, rows[picks]).amin(1).max()) < 1


def test_coreset_of_more_than_there_are_is_all() -> None:
    assert coreset(torch.randn(5, 3), 9, generator()).tolist() == [0, 1, 2, 3, 4]
    assert coreset(torch.randn(5, 3), 0, generator()).tolist() == []


@pytest.mark.parametrize(("drawn", "chosen"), [(0.0, 40), (0.25, 30), (0.5, 20), (1.0, 0)])
def test_some_are_drawn_where_features_are_dense(drawn: float, chosen: int) -> None:
    centres = F.normalize(torch.randn(20, 40, generator=generator()), dim=1)
    owners = torch.cat([torch.zeros(400), *(torch.full((3,), float(k)) for k in range(1, 20))])
    rows = centres[owners.long()] + torch.randn(457, 40, generator=generator(1)) * 0.01
    memory = FeatureMemory(40, 40)
    memory.fit(rows, generator(2), drawn)
    directions = memory.directions(rows)
    kept = (memory.kept[:, None] - directions).abs().amax(2).argmin(1)
    assert kept.unique().numel() == 40  # nothing twice
    assert kept[:chosen].tolist() == coreset(directions, chosen, generator(2)).tolist()
    common = (owners[kept[chosen:]] == 0).float().mean()
    assert not 40 - chosen or float(common) > 0.75


def test_with_few_features_all_are_kept_however_they_are_drawn(normal: torch.Tensor) -> None:
    for drawn in (0.0, 0.25, 1.0):
        memory = FeatureMemory(320, 6)
        memory.fit(normal, generator(), drawn)
        assert len(memory) == 300
        assert float(memory(normal[None]).max()) < 2e-3


@pytest.mark.parametrize("drawn", [-0.1, 1.1, float("nan")])
def test_what_is_drawn_is_a_share(normal: torch.Tensor, drawn: float) -> None:
    with pytest.raises(ValueError, match=f"expected a share between 0 and 1, got drawn={drawn}"):
        FeatureMemory(40, 6).fit(normal, generator(), drawn)


def test_without_a_feature_nothing_can_be_kept() -> None:
    with pytest.raises(ValueError, match="expected at least one feature, got 0"):
        FeatureMemory(3, 2).fit(torch.zeros(0, 2), generator())


def test_what_is_compared_is_the_teachers_feature() -> None:
    mean, std = torch.rand(9, generator=generator()) + 2, torch.rand(9, generator=generator(1)) + 1
    decoder = Decoder(6, 9)
    memory = FeatureMemory(40, 6, 9)
    memory.learn_decoder(decoder, mean, std)
    features = torch.randn(30, 6, generator=generator())
    with torch.no_grad():
        taught = decoder(features) * std + mean
        torch.testing.assert_close(memory.decoded(features), taught)
        memory.fit(features, generator())
        expected = FeatureMemory(40, 9)
        expected.fit(taught, generator())
        torch.testing.assert_close(memory.kept, expected.kept, atol=1e-5, rtol=1e-5)
        other = torch.randn(1, 8, 6, generator=generator(2))
        found = memory(other)
        torch.testing.assert_close(
            found, expected(decoder(other) * std + mean), atol=1e-4, rtol=1e-4
        )
    assert not any(p.requires_grad for p in memory.parameters())
