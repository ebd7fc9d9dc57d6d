import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from glance_ext.data.grid import patch_grid
from glance_ext.models import local_plan
from glance_ext.models.local_net import LocalNet
from glance_ext.models.local_plan import LocalPlan, pass_multiply_adds

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def small_layers(kernel_size: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Local-Net's layers with few channels."""
    torch.manual_seed(kernel_size)
    return nn.Sequential(
        nn.Conv2d(3, 4, kernel_size),
        nn.LeakyReLU(0.005),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 5),
        nn.LeakyReLU(0.005),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 2),
        nn.LeakyReLU(0.005),
        nn.Conv2d(6, 7, 4),
    ).to(dtype)


def alone(
    layers: nn.Module, images: Tensor, rows: Sequence[int], columns: Sequence[int], size: int = 33
) -> Tensor:
    """Each patch cut out, and described by itself: ``(N, P, n)``."""
    patches = [
        images[:, :, row : row + size, column : column + size] for row in rows for column in columns
    ]
    return layers(torch.cat(patches)).reshape(len(patches), len(images), -1).transpose(0, 1)


def assert_same_features(shared: Tensor, expected: Tensor) -> None:
    assert shared.shape == expected.shape
    assert shared.dtype == expected.dtype
    error = float((shared - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE[expected.dtype]


def flush_starts(stride: int, size: int) -> list[int]:
    return list(patch_grid(stride, image_size=size).starts)


def set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for parts in set_partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


# Equality with the patch alone


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
def test_every_patch_of_a_grid_is_described_as_if_alone(stride: int, kernel_size: int) -> None:
    layers = small_layers(kernel_size)
    height, width = 36 + 4 * stride, 35 + 3 * stride
    rows, columns = flush_starts(stride, height), flush_starts(stride, width)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        shared = LocalPlan(layers, rows, columns, 33)(layers, images)
        assert_same_features(shared, alone(layers, images, rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kernel_size", "stride"), [(5, 4), (5, 3), (3, 2), (3, 5)])
def test_local_net_describes_a_small_image_as_its_patches_alone(
    kernel_size: int, stride: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    net = LocalNet(kernel_size, 16).to(dtype)
    rows, columns = flush_starts(stride, 42), flush_starts(stride, 40)
    images = torch.randn(1, 3, 42, 40, dtype=dtype)
    with torch.no_grad():
        shared = net.dense(images, (rows, columns))
        assert_same_features(shared, alone(net, images, rows, columns))


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("name", ["4", "paper", "8"])
def test_local_net_describes_the_grids_of_a_whole_image(name: str, kernel_size: int) -> None:
    torch.manual_seed(1)
    net = LocalNet(kernel_size)
    grid = patch_grid(name)
    plan = net.plan(grid.starts)
    image = torch.randn(1, 3, 256, 256)
    n = len(grid.starts)
    chosen = {0, n - 1, n * (n - 1), n * n - 1, *torch.randperm(n * n)[:12].tolist()}
    with torch.no_grad():
        shared = net.dense(image, plan)
        assert shared.shape == (1, len(grid), 128)
        for index in chosen:
            row, column = grid.origins[index].tolist()
            expected = alone(net, image, [row], [column])
            assert_same_features(shared[:, index : index + 1], expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sets(st.integers(0, 70), min_size=1, max_size=9),
    columns=st.sets(st.integers(0, 45), min_size=1, max_size=9),
    kernel_size=st.sampled_from([3, 5]),
)
def test_any_starts_will_do(rows: set[int], columns: set[int], kernel_size: int) -> None:
    layers = small_layers(kernel_size)
    starts = sorted(rows), sorted(columns)
    images = torch.randn(1, 3, 103, 78, dtype=torch.float64)
    with torch.no_grad():
        shared = LocalPlan(layers, *starts, 33)(layers, images)
        assert_same_features(shared, alone(layers, images, *starts))


@pytest.mark.parametrize("name", ["4", "7", "33"])
@pytest.mark.parametrize("lines", [1, 3])
def test_features_are_the_same_however_narrow_the_bands(
    name: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = small_layers(5)
    starts = patch_grid(name).starts
    plan = LocalPlan(layers, starts, starts, 33)
    images = torch.randn(2, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        monkeypatch.setattr(local_plan, "_BAND_BYTES", lines * 2 * 2 * 252 * 4 * 8)
        in_bands = plan(layers, images)
        monkeypatch.setattr(local_plan, "_pooled_in_bands", lambda *_: None)
        torch.testing.assert_close(in_bands, plan(layers, images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("column", range(4))
def test_a_single_patch_of_each_residue(row: int, column: int) -> None:
    layers = small_layers(5)
    image = torch.randn(1, 3, 36, 36, dtype=torch.float64)
    with torch.no_grad():
        shared = LocalPlan(layers, [row], [column], 33)(layers, image)
        assert_same_features(shared, alone(layers, image, [row], [column]))


@pytest.mark.parametrize(
    ("layers", "patch_size"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, (5, 2), stride=(2, 1)), nn.Conv2d(4, 6, (3, 8))), 9),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(3, 2), nn.Conv2d(6, 4, 3, groups=2)), 9),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, 4, 4, 3, bias=False)), 5),
        (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.MaxPool2d(3, 3)), 9),
        (nn.Sequential(nn.Conv2d(3, 4, 2), nn.LeakyReLU(-0.5), nn.MaxPool2d(2)), 3),
        (nn.Sequential(nn.Conv2d(3, 4, 2), nn.LeakyReLU(0.3), nn.LeakyReLU(0.1)), 2),
    ],
)
def test_other_layers_than_local_nets(layers: nn.Sequential, patch_size: int) -> None:
    torch.manual_seed(0)
    layers = layers.double()
    rows, columns = [0, 1, 5, 6, 11, 17, 30], [2, 4, 8, 10, 12, 25]
    images = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    before = images.clone()
    with torch.no_grad():
        shared = LocalPlan(layers, rows, columns, patch_size)(layers, images)
        assert_same_features(shared, alone(layers, images, rows, columns, patch_size))
    assert torch.equal(images, before)


def test_the_layout_of_the_images_does_not_matter() -> None:
    layers = small_layers(5)
    plan = LocalPlan(layers, [0, 4, 7], [0, 3, 11], 33)
    images = torch.randn(3, 3, 44, 44, dtype=torch.float64)
    wide = torch.zeros(3, 5, 44, 88, dtype=torch.float64)
    wide[:, 1:4, :, ::2] = images
    with torch.no_grad():
        expected = plan(layers, images)
        in_channels_last = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(plan(layers, in_channels_last), expected)
        assert torch.equal(plan(layers, wide[:, 1:4, :, ::2]), expected)
    assert expected.is_contiguous()


def test_images_of_a_batch_do_not_mix() -> None:
    layers = small_layers(5)
    plan = LocalPlan(layers, [0, 4, 7, 30], [0, 3, 11], 33)
    images = torch.randn(3, 3, 64, 50, dtype=torch.float64)
    with torch.no_grad():
        together = plan(layers, images)
        assert_same_features(together, torch.cat([plan(layers, image[None]) for image in images]))
        assert plan(layers, images[:0]).shape == (0, 12, 7)


def test_a_large_batch_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = small_layers(5)
    plan = LocalPlan(layers, [0, 4, 7], [0, 3, 11], 33)
    images = torch.randn(5, 3, 44, 44, dtype=torch.float64)
    batches: list[int] = []
    run = plan._run
    monkeypatch.setattr(plan, "_run", lambda steps, x: batches.append(len(x)) or run(steps, x))
    with torch.no_grad():
        together = plan(layers, images)
        monkeypatch.setattr(local_plan, "_CPU_BYTES", 2 * plan._elements * 8)
        assert_same_features(plan(layers, images), together)
    assert batches == [5, 2, 2, 1]


def test_bfloat16_is_as_exact_as_the_patch_alone() -> None:
    torch.manual_seed(0)
    net = LocalNet(5, 16)
    image = torch.randn(1, 3, 45, 44)
    rows, columns = [0, 3, 4, 12], [1, 5, 11]
    with torch.no_grad():
        exact = alone(net, image, rows, columns)
        net, image = net.bfloat16(), image.bfloat16()
        shared, single = net.dense(image, (rows, columns)), alone(net, image, rows, columns)
    assert shared.dtype == torch.bfloat16
    allowed = 2 * float((single - exact).abs().max())
    assert 0 < float((shared - exact).abs().max()) <= allowed


# What a feature sees


@pytest.mark.parametrize("name", ["4", "paper", "2"])
@pytest.mark.parametrize(("kernel_size", "sees"), [(3, 30), (5, 32)])
def test_a_defect_changes_the_patches_that_see_it_and_no_other(
    name: str, kernel_size: int, sees: int
) -> None:
    layers = small_layers(kernel_size)
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                layer.weight.abs_()  # nothing cancels: a brighter pixel is a larger feature
    grid = patch_grid(name)
    plan = LocalPlan(layers, grid.starts, grid.starts, 33)
    image = torch.zeros(1, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        before = plan(layers, image)
        corners = itertools.product((0, 255), (0, 255))
        inner = itertools.product((0, 100, 222 + sees, 223 + sees), (31, 222 + sees))
        for row, column in {*corners, *inner}:
            if max(row, column) > 255:
                continue
            changed = image.clone()
            changed[:, :, row, column] = 100
            differs = (plan(layers, changed) != before).any(2)[0]
            seen = (grid.origins <= torch.tensor([row, column])).all(1)
            seen &= (grid.origins + sees > torch.tensor([row, column])).all(1)
            assert torch.equal(differs, seen), (row, column)


# Multiply-adds


def _flops_of_the_sum(
    input: list[int], weight: list[int], bias: object, *, out_shape: list[int]
) -> int:
    """Of a convolution as it stands, however it is computed."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


FLOPS = partial(
    FlopCounterMode,
    display=False,
    custom_mapping={torch.ops.glance_ext.winograd_conv2d: _flops_of_the_sum},
)


def executed_multiply_adds(plan: LocalPlan, layers: nn.Sequential, image: Tensor) -> int:
    with torch.no_grad(), FLOPS() as counter:
        plan(layers, image)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["1", "2", "4", "5", "7", "8", "33", "paper"])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_what_is_executed_is_what_was_counted(
    name: str, kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = small_layers(kernel_size, torch.float32)
    starts = patch_grid(name).starts
    plan = LocalPlan(layers, starts, starts, 33)
    image = torch.rand(1, 3, 256, 256)
    in_bands = executed_multiply_adds(plan, layers, image)
    again = 252 * layers[0].weight.numel()  # the last line of each band
    assert plan.multiply_adds <= in_bands <= plan.multiply_adds + again
    monkeypatch.setattr(local_plan, "_pooled_in_bands", lambda *_: None)
    assert executed_multiply_adds(plan, layers, image) == plan.multiply_adds


@pytest.mark.parametrize(("kernel_size", "millions"), [(3, 107.2), (5, 94.7)])
def test_a_pass_is_counted_by_its_layers(kernel_size: int, millions: float) -> None:
    net = LocalNet(kernel_size)
    counted = pass_multiply_adds(net.layers, 33, 33)
    assert counted / 1e6 == pytest.approx(millions, abs=0.05)
    with torch.no_grad(), FLOPS() as counter:
        net(torch.rand(1, 3, 33, 33))
        net.layers(torch.rand(1, 3, 61, 40))
    assert counter.get_total_flops() == 2 * (counted + pass_multiply_adds(net.layers, 61, 40))


def activations_that_patches_need(
    windows: Sequence[tuple[int, int, int]], rows: Sequence[int], columns: Sequence[int]
) -> int:
    """Multiply-adds of the activations that some patch needs, found patch by patch.

    An activation is known by its layer and by the pixel at which its receptive field begins.
    """
    needed: list[set[tuple[int, int]]] = [set() for _ in windows]
    for origin in itertools.product(rows, columns):
        places = {origin}
        for index in reversed(range(len(windows))):
            needed[index] |= places
            kernel = windows[index][0]
            step = math.prod(stride for _, stride, _ in windows[:index])
            steps = range(0, kernel * step, step)
            places = {(r + i, c + j) for r, c in places for i in steps for j in steps}
    return sum(len(n) * cost for n, (_, _, cost) in zip(needed, windows, strict=True))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([0], [0]),
        ([0, 1, 2, 3], [0, 4, 8, 11]),
        ([0, 4, 8, 12, 14], [0, 2]),
        ([0, 11, 23, 35, 46, 58], [1, 22, 43, 64]),
        ([0, 33, 66, 67], [5, 12, 19, 26]),
    ],
)
def test_each_activation_that_a_patch_needs_is_computed_once(
    rows: list[int], columns: list[int]
) -> None:
    windows = [
        (5, 1, 4 * 3 * 25),
        (2, 2, 0),
        (5, 1, 5 * 4 * 25),
        (2, 2, 0),
        (2, 1, 6 * 5 * 4),
        (4, 1, 7 * 6 * 16),
    ]
    plan = LocalPlan(small_layers(5), rows, columns, 33)
    assert plan.multiply_adds == activations_that_patches_need(windows, rows, columns)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([0, 4, 8, 12, 15], [0, 8, 16]),
        ([0, 11, 23, 35, 46], [0, 58, 70, 82]),
        ([0, 20, 40, 60], [0, 1, 2, 3]),
        ([0, 36, 100, 104], [3, 40, 43, 83]),
    ],
)
def test_no_division_into_separate_passes_has_fewer_multiply_adds(
    kernel_size: int, rows: list[int], columns: list[int]
) -> None:
    net = LocalNet(kernel_size)

    def extents(starts: list[int]) -> list[list[int]]:
        """Of each division into passes of one residue modulo 4: the pixels that each one needs."""
        return [
            [max(part) - min(part) + (30 if kernel_size == 3 else 32) for part in parts]
            for parts in set_partitions(starts)
            if all(len({start % 4 for start in part}) == 1 for part in parts)
        ]

    costs = {
        (height, width): pass_multiply_adds(net.layers, height, width)
        for height in {e for parts in extents(rows) for e in parts}
        for width in {e for parts in extents(columns) for e in parts}
    }
    best = min(
        sum(costs[size] for size in itertools.product(heights, widths))
        for heights in extents(rows)
        for widths in extents(columns)
    )
    assert net.plan(rows, columns).multiply_adds <= best


def test_multiply_adds_of_the_usual_grids() -> None:
    net = LocalNet(5)
    billions = {
        name: net.plan(patch_grid(name).starts).multiply_adds / 1e9
        for name in ("1", "2", "4", "8", "paper")
    }
    # In strides 4 and 8 the last row begins at 223, which shares no pool with the others.
    expected = {"1": 89.49, "2": 25.26, "4": 17.19, "8": 15.48, "paper": 18.94}
    assert billions == pytest.approx(expected, abs=0.01)
    aligned = list(range(0, 221, 4))
    assert net.plan(aligned).multiply_adds <= pass_multiply_adds(net.layers, 253, 253)


# Order of LeakyReLU and pool


def test_pooling_before_leaky_relu_gives_the_same_bits() -> None:
    values = torch.randn(1, 6, 40, 40) * 10.0 ** torch.randint(-44, 38, (1, 6, 40, 40))
    values[0, 0, :4, :6] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -1e-45, -3.4e38])
    activation, pool = nn.LeakyReLU(0.005), nn.MaxPool2d(2)
    expected = pool(activation(values))
    torch.testing.assert_close(activation(pool(values)), expected, rtol=0, atol=0, equal_nan=True)
    steps = local_plan._steps([nn.Conv2d(6, 6, 1), activation, pool])
    assert [(type(step.layer), step.slopes) for step in steps] == [
        (nn.Conv2d, ()),
        (nn.MaxPool2d, (0.005,)),
    ]
    ours = steps[1](values.permute(0, 2, 3, 1), (2, 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_a_falling_leaky_relu_stays_before_the_pool() -> None:
    steps = local_plan._steps([nn.Conv2d(6, 6, 1), nn.LeakyReLU(-0.1), nn.MaxPool2d(2)])
    assert [step.slopes for step in steps] == [(-0.1,), ()]


# Gradients


def test_gradients_are_those_of_the_patches_alone() -> None:
    layers = small_layers(5)
    rows, columns = [0, 1, 4, 24, 28], [0, 3, 15]
    images = torch.randn(2, 3, 61, 48, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 15, 7, dtype=torch.float64)
    inputs = [images, *layers.parameters()]
    shared = LocalPlan(layers, rows, columns, 33)(layers, images)
    ours = torch.autograd.grad((shared * weights).sum(), inputs)
    theirs = torch.autograd.grad((alone(layers, images, rows, columns) * weights).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        assert_same_features(our, their)


# A plan is good for other weights, and says what it is not good for


def test_a_plan_knows_sizes_and_no_weights() -> None:
    net, other = LocalNet(5, 8), LocalNet(5, 8)
    plan = net.plan([0, 4], [1])
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert_same_features(other.dense(image, plan), alone(other, image, [0, 4], [1]))
    assert (len(plan), plan.row_starts, plan.column_starts) == (2, (0, 4), (1,))
    for wrong in (LocalNet(3, 8), LocalNet(5, 9)):
        with pytest.raises(ValueError, match="expected the layers that were planned for"):
            wrong.dense(image, plan)


def test_columns_are_rows_unless_given() -> None:
    plan = LocalNet(5, 8).plan([0, 7])
    assert plan.column_starts == (0, 7)


@pytest.mark.parametrize(
    ("rows", "columns", "patch_size", "message"),
    [
        ([], [0], 33, "expected row_starts to have at least one start, got none"),
        ([0], [], 33, "expected column_starts to have at least one start, got none"),
        ([0, 8, 4], [0], 33, "expected ascending row_starts, got 4 behind 8"),
        ([0], [3, 3], 33, "expected ascending column_starts, got 3 behind 3"),
        ([-4, 0], [0], 33, "expected row_starts of 0 or more, got -4"),
        ([0], [0], 45, "expected a patch_size that the layers shrink to 1x1, got 45, which "),
        ([0], [0], 31, "got 31, which becomes 0x0"),
    ],
)
def test_wrong_grids_are_refused(
    rows: list[int], columns: list[int], patch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LocalNet(5, 8).plan(rows, columns, patch_size)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((42, 60), "33x33 patch at row 10, column 3, got images of 42x60 pixels"),
        ((43, 52), "33x33 patch at row 0, column 20, got images of 43x52 pixels"),
        ((20, 20), "33x33 patch at row 0, column 3, got images of 20x20 pixels"),
    ],
)
def test_a_patch_outside_of_the_image_is_named(size: tuple[int, int], message: str) -> None:
    layers = small_layers(5)
    plan = LocalPlan(layers, [0, 10], [3, 20], 33)
    with pytest.raises(ValueError, match=message):
        plan(layers, torch.rand(1, 3, *size, dtype=torch.float64))
    with torch.no_grad():
        assert plan(layers, torch.rand(1, 3, 43, 53, dtype=torch.float64)).shape == (1, 4, 7)


@pytest.mark.parametrize("shape", [(3, 43, 53), (1, 4, 43, 53)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    layers = small_layers(5)
    plan = LocalPlan(layers, [0], [0], 33)
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\), got"):
        plan(layers, torch.rand(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, dilation=2),
        nn.Conv2d(3, 4, 2, stride=3),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, padding=1),
    ],
)
def test_layers_that_know_a_border_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected layers without padding.*got (Conv|MaxPool)2d"):
        LocalPlan([layer], [0], [0], 3)


def test_layers_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="got BatchNorm2d as layer 1"):
        LocalPlan([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], [0], [0], 3)
    with pytest.raises(TypeError, match="got LeakyReLU as layer 0"):
        LocalPlan([nn.LeakyReLU()], [0], [0], 1)
    with pytest.raises(ValueError, match="at least one layer, got none"):
        LocalPlan([], [0], [0], 1)
