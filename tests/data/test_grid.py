import pytest
import torch

from glance_ext.data.grid import patch_grid
from glance_ext.ops import aggregate_patch_scores


def test_the_papers_grid_is_20_by_20_at_its_starts() -> None:
    grid = patch_grid("paper")
    assert grid.starts == tuple(int(j * 223 / 19) for j in range(20))
    assert grid.starts[-1] == 223
    assert len(grid) == 400
    assert grid.origins.shape == (400, 2)
    assert grid.name == "paper"


def test_origins_go_row_by_row() -> None:
    grid = patch_grid(16, patch_size=33, image_size=65)
    assert grid.starts == (0, 16, 32)
    expected = [[r, c] for r in (0, 16, 32) for c in (0, 16, 32)]
    assert grid.origins.tolist() == expected
    assert grid.origins.dtype == torch.int64


@pytest.mark.parametrize("stride", range(1, 34))
def test_a_stride_covers_every_pixel_up_to_the_border(stride: int) -> None:
    grid = patch_grid(stride)
    assert grid.name == str(stride)
    assert grid.starts[0] == 0
    assert grid.starts[-1] == 223
    steps = [b - a for a, b in zip(grid.starts, grid.starts[1:], strict=False)]
    assert all(step == stride for step in steps[:-1])
    assert 0 < steps[-1] <= stride
    covered = torch.zeros(256, dtype=torch.bool)
    for start in grid.starts:
        covered[start : start + 33] = True
    assert covered.all()


@pytest.mark.parametrize("name", ["paper", 1, 7, 8, 13, 32, 33])
def test_aggregation_takes_every_grid(name: str | int) -> None:
    grid = patch_grid(name)
    scores = torch.ones(1, len(grid))
    result = aggregate_patch_scores(scores, 33, (256, 256), origins=grid.origins)
    torch.testing.assert_close(result, torch.ones(1, 256, 256))


@pytest.mark.parametrize("name", ["paper", 5, 8, 33])
@pytest.mark.parametrize("corner", [(0, 0), (0, 255), (255, 0), (255, 255)])
def test_a_defect_in_a_corner_is_seen_there(name: str | int, corner: tuple[int, int]) -> None:
    grid = patch_grid(name)
    inside = (
        (grid.origins <= torch.tensor(corner)) & (torch.tensor(corner) < grid.origins + 33)
    ).all(1)
    assert inside.any()
    result = aggregate_patch_scores(inside.float()[None], 33, (256, 256), origins=grid.origins)[0]
    assert result[corner] == result.max() > 0
    opposite = (255 - corner[0], 255 - corner[1])
    assert result[opposite] == 0


@pytest.mark.parametrize("name", ["", "papers", "0", "34", "-1", "8.5", "1e1", 0, 34])
def test_what_is_no_grid_is_refused(name: str | int) -> None:
    with pytest.raises(ValueError, match=r"expected 'paper' or a stride of 1 to 33 pixels, got"):
        patch_grid(name)


def test_a_grid_needs_room_for_a_patch() -> None:
    assert patch_grid(8, image_size=33).origins.tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="at least 33 pixels, got 32"):
        patch_grid(8, image_size=32)
