import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from glance_ext.data import grain
from glance_ext.data.grain import NOISY, UNSHARP, vary_grain


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_some_images_are_noisier_some_less_sharp_and_the_rest_as_they_were() -> None:
    images = torch.rand((400, 3, 24, 31), generator=generator(1)) * 0.5 + 0.25
    before = images.clone()
    varied = vary_grain(images, generator())
    assert torch.equal(images, before)
    assert varied.shape == images.shape
    assert varied.dtype == images.dtype
    assert torch.equal(varied, vary_grain(images, generator()))

    changed = (varied - images).abs().amax((1, 2, 3)) > 0
    assert float(changed.float().mean()) == pytest.approx(NOISY + UNSHARP, abs=0.08)
    # blurring noise makes it weaker, and more noise makes it stronger
    steps = (varied.diff(dim=3).std((1, 2, 3)) / images.diff(dim=3).std((1, 2, 3)))[changed]
    weaker = float((steps < 0.98).float().mean())
    assert weaker == pytest.approx(UNSHARP / (NOISY + UNSHARP), abs=0.1)
    assert float((varied - images)[changed][steps > 1].abs().max()) < 0.02 * 5.5


def test_an_unsharp_image_is_blurred_by_a_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grain, "NOISY", 0.0)
    monkeypatch.setattr(grain, "UNSHARP", 1.0)
    monkeypatch.setattr(grain, "_BLUR", (0.7, 0.7))
    image = torch.rand((1, 3, 20, 30), generator=generator(2), dtype=torch.float64)
    expected = image.numpy()
    for axis in (2, 3):
        expected = gaussian_filter1d(expected, 0.7, axis, mode="mirror", radius=2)
    torch.testing.assert_close(vary_grain(image, generator()), torch.from_numpy(expected))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_values_stay_in_range(level: float) -> None:
    images = torch.full((100, 3, 16, 16), level)
    varied = vary_grain(images, generator())
    assert float(varied.min()) >= 0
    assert float(varied.max()) <= 1
    assert not torch.equal(varied, images)
