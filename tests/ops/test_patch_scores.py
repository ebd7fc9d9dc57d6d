"""aggregate_patch_scores: its numbers, its patches, its messages."""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glance_ext.ops import aggregate_patch_scores, reference
from glance_ext.testing import assert_matches_reference
from tests.ops.bad_calls import assert_all_forms_say

MODES = ["mean", "gaussian", "max", "idw"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
native = torch.ops.glance_ext.aggregate_patch_scores
property_test = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass
class Patches:
    """Patches that cover an image, as a grid or as a list; ``args`` are the torch op's."""

    shape: list[int]  # of the scores
    origins: Tensor | None
    patch: list[int]
    image: list[int]
    stride: list[int]
    parameter: float
    seed: int

    def scores(self, dtype: torch.dtype) -> Tensor:
        """All different, and exact in every dtype while there are no more than 256."""
        random = torch.Generator().manual_seed(self.seed)
        order = torch.rand(self.shape, generator=random).flatten(1).argsort(1).argsort(1)
        return ((order - 20) / 8).reshape(self.shape).to(dtype)

    def args(self, scores: Tensor, mode: str) -> list[Any]:
        origins = None if self.origins is None else self.origins.to(scores.device)
        return [scores, origins, self.patch, self.image, self.stride, mode, self.parameter]

    def corners(self) -> list[list[int]]:
        if self.origins is not None:
            return self.origins.tolist()
        rows, columns = (
            [i * s for i in range(n)] for n, s in zip(self.shape[1:], self.stride, strict=True)
        )
        return [list(corner) for corner in itertools.product(rows, columns)]


@st.composite
def covers(draw: st.DrawFn, mode: str, largest: int = 5) -> Patches:
    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    n, seed = size(0, 3), size(0, 2**31 - 1)
    patch = [size(1, largest), size(1, largest)]
    choices = [0.1, 0.25, 3.0] if mode == "gaussian" else [0.5, 2.0, 5.0, 8.0]
    parameter = draw(st.sampled_from(choices))
    if draw(st.booleans()):
        grid = [size(1, 4), size(1, 4)]
        stride = [size(1, side) for side in patch]
        image = [(g - 1) * s + p for g, s, p in zip(grid, stride, patch, strict=True)]
        if mode == "idw":
            image = [side + size(0, 2) for side in image]  # which nothing has to cover
        return Patches([n, *grid], None, patch, image, stride, parameter, seed)
    image = [side + size(0, 2 * largest) for side in patch]
    sides = [
        sorted({min(start, total - side) for start in range(0, total, side)})
        for total, side in zip(image, patch, strict=True)
    ]
    corners = list(itertools.product(*sides))
    for _ in range(size(0, 4)):  # any others, and some of them twice
        extra = tuple(size(0, total - side) for total, side in zip(image, patch, strict=True))
        corners += [extra] * size(1, 2)
    corners = draw(st.permutations(corners))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    origins = torch.tensor(corners, dtype=dtype)
    return Patches([n, len(corners)], origins, patch, image, [1, 1], parameter, seed)


def by_hand(patches: Patches, scores: Tensor, mode: str) -> Tensor:
    """The equations of patch_scores.h, one pixel at a time."""
    (ph, pw), (height, width) = patches.patch, patches.image
    flat, corners = scores.flatten(1).tolist(), patches.corners()
    result = torch.zeros(len(flat), height, width, dtype=torch.float64)
    for n, y, x in itertools.product(range(len(flat)), range(height), range(width)):
        terms = []
        for (row, column), score in zip(corners, flat[n], strict=True):
            dy, dx = y - row - (ph - 1) / 2, x - column - (pw - 1) / 2
            if mode == "idw":
                distance = math.hypot(dy, dx)
                weight = distance**-patches.parameter if distance else math.inf
            elif not (row <= y < row + ph and column <= x < column + pw):
                continue
            elif mode == "gaussian":
                sigma = patches.parameter
                weight = math.exp(-0.5 * ((dy / (sigma * ph)) ** 2 + (dx / (sigma * pw)) ** 2))
            else:
                weight = 1.0
            terms.append((weight, score))
        if mode == "max":
            result[n, y, x] = max(score for _, score in terms)
            continue
        if any(weight == math.inf for weight, _ in terms):
            terms = [(1.0, score) for weight, score in terms if weight == math.inf]
        total = sum(weight for weight, _ in terms)
        result[n, y, x] = sum(weight * score for weight, score in terms) / total
    return result


@every_mode
@property_test
@given(data=st.data())
def test_reference_is_the_equation(mode: str, data: st.DataObject) -> None:
    patches = data.draw(covers(mode, largest=3))
    scores = patches.scores(torch.float64)
    got = reference.aggregate_patch_scores(*patches.args(scores, mode))
    torch.testing.assert_close(got, by_hand(patches, scores, mode))


def with_gradient(
    op: Any, patches: Patches, scores: Tensor, mode: str, grad: Tensor
) -> list[Tensor]:
    leaf = scores.detach().requires_grad_()
    result = op(*patches.args(leaf, mode))
    return [result, *torch.autograd.grad(result, leaf, grad.to(result))]


@every_mode
@every_dtype
@property_test
@given(data=st.data())
def test_native_op_matches_the_reference_forward_and_backward(
    mode: str, dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    patches = data.draw(covers(mode))
    scores = patches.scores(dtype)
    shape = (scores.shape[0], *patches.image)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = with_gradient(native, patches, scores.to(device), mode, grad)
    plain = reference.aggregate_patch_scores
    exact = with_gradient(plain, patches, scores.double(), mode, grad)
    same = with_gradient(plain, patches, scores, mode, grad)
    size = with_gradient(plain, patches, scores.double().abs(), mode, grad.abs())
    for name, *tensors, bound in zip(
        ("map", "grad of scores"), got, exact, same, size, strict=True
    ):
        largest = float(bound.detach().max()) if bound.numel() else 1.0
        assert_matches_reference(*tensors, name=name, scale=max(1.0, largest))
    if mode == "max":
        assert torch.equal(got[0].cpu(), same[0])


@every_mode
@property_test
@given(data=st.data())
def test_grid_equals_its_list_of_origins(mode: str, device: str, data: st.DataObject) -> None:
    patches = data.draw(covers(mode).filter(lambda p: p.origins is None))
    scores = patches.scores(torch.float64).to(device)
    settings = {"mode": mode}
    if mode in ("gaussian", "idw"):
        settings |= {{"gaussian": "sigma", "idw": "power"}[mode]: patches.parameter}
    on_grid = aggregate_patch_scores(
        scores, patches.patch, patches.image, stride=patches.stride, **settings
    )
    origins = torch.tensor(patches.corners(), dtype=torch.int32)  # may stay on the CPU
    listed = aggregate_patch_scores(
        scores.flatten(1), patches.patch, patches.image, origins=origins, **settings
    )
    assert torch.equal(on_grid, listed)


@every_mode
@property_test
@given(data=st.data())
def test_order_of_the_patches_does_not_matter(mode: str, device: str, data: st.DataObject) -> None:
    patches = data.draw(covers(mode).filter(lambda p: p.origins is not None))
    scores = patches.scores(torch.float64).to(device)
    args = patches.args(scores, mode)
    order = torch.tensor(data.draw(st.permutations(range(scores.shape[1]))), device=device)
    shuffled = native(scores[:, order], args[1][order], *args[2:])
    torch.testing.assert_close(shuffled, native(*args))


@every_mode
@every_dtype
@property_test
@given(data=st.data())
def test_equal_scores_give_an_equal_map(
    mode: str, dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    patches = data.draw(covers(mode))
    scores = torch.full(patches.shape, 0.7, dtype=dtype, device=device)
    result = native(*patches.args(scores, mode))
    assert result.dtype == dtype
    assert result.shape == (patches.shape[0], *patches.image)
    torch.testing.assert_close(
        result, torch.full_like(result, 0.7), atol=0, rtol=None or 4 * torch.finfo(dtype).eps
    )


@every_mode
def test_every_pixel_gives_a_gradient_of_one_in_all(mode: str, device: str) -> None:
    """The patches' weights at a pixel add up to 1: a partition of unity."""
    scores = torch.randn(1, 4, 3, device=device, dtype=torch.float64, requires_grad=True)
    result = aggregate_patch_scores(scores, (4, 3), (10, 7), stride=(2, 2), mode=mode)
    ones = torch.ones_like(result)
    (grad,) = torch.autograd.grad(result, scores, ones)
    assert grad.sum().item() == pytest.approx(70)


@every_mode
@every_dtype
def test_nan_score_reaches_exactly_the_pixels_of_its_patch(
    mode: str, dtype: torch.dtype, device: str
) -> None:
    scores = torch.randn(2, 3, 3, device=device).to(dtype)
    scores[1, 1, 2] = float("nan")
    covered = torch.zeros(2, 7, 7, dtype=torch.bool)
    if mode == "idw":  # has a part in all pixels but the centres of other patches
        covered[1] = True
        covered[1, 1::2, 1::2] = False
        covered[1, 3, 5] = True
    else:
        covered[1, 2:5, 4:7] = True
    arguments = [scores, None, [3, 3], [7, 7], [2, 2], mode, 0.25 if mode == "gaussian" else 9.0]
    for op in (native, reference.aggregate_patch_scores):
        assert torch.equal(op(*arguments).isnan().cpu(), covered)


@every_mode
def test_nan_gradient_reaches_exactly_the_patches_of_its_pixel(mode: str, device: str) -> None:
    scores = torch.randn(1, 3, 3, device=device, dtype=torch.float64)
    grad = torch.ones(1, 7, 7, device=device, dtype=torch.float64)
    grad[0, 3, 5] = float("nan")  # the centre of patch (1, 2), which patch (1, 1) touches not
    arguments = [None, [3, 3], [7, 7], [2, 2], mode, 0.25 if mode == "gaussian" else 5.0]
    expected = torch.zeros(1, 3, 3, dtype=torch.bool)
    expected[0, 1, 2] = True
    for op in (native, reference.aggregate_patch_scores):
        leaf = scores.clone().requires_grad_()
        (got,) = torch.autograd.grad(op(leaf, *arguments), leaf, grad)
        if mode == "max" and op is not native:
            continue  # zero times NaN in torch's own gradient of where
        assert torch.equal(got.isnan().cpu(), expected)


def test_max_prefers_nan_and_passes_ties_to_the_first_patch(device: str) -> None:
    origins = torch.tensor([[0, 1], [0, 0], [0, 0]])
    scores = torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, 3.0]], device=device, requires_grad=True)
    result = aggregate_patch_scores(scores, (1, 2), (1, 3), origins=origins, mode="max")
    assert result.tolist() == [[[2.0, 2.0, 2.0]], [[3.0, 3.0, 1.0]]]
    weights = torch.tensor([[[1.0, 10.0, 100.0]]], device=device).expand(2, 1, 3)
    (grad,) = torch.autograd.grad(result, scores, weights)
    assert grad.tolist() == [[110.0, 1.0, 0.0], [100.0, 11.0, 0.0]]
    plain = reference.aggregate_patch_scores(scores, origins, [1, 2], [1, 3], [1, 1], "max", 0.0)
    assert torch.equal(plain, result)
    with_nan = torch.tensor([[float("nan"), 2.0, float("inf")]], device=device)
    result = aggregate_patch_scores(with_nan, (1, 2), (1, 3), origins=origins, mode="max")
    assert torch.equal(result.isnan().cpu(), torch.tensor([[[False, True, True]]]))
    assert result[0, 0, 0] == float("inf")


def test_max_of_negative_infinities_is_negative_infinity(device: str) -> None:
    scores = torch.full((1, 2, 2), -float("inf"), device=device, requires_grad=True)
    result = aggregate_patch_scores(scores, 2, 3, stride=1, mode="max")
    assert (result == -float("inf")).all()
    (grad,) = torch.autograd.grad(result.sum(), scores)
    assert grad.tolist() == [[[4.0, 2.0], [2.0, 1.0]]]


def test_gaussian_weights_by_hand(device: str) -> None:
    scores = torch.tensor([[1.0, 3.0]], device=device, dtype=torch.float64)
    origins = torch.tensor([[0, 0], [0, 1]])
    result = aggregate_patch_scores(
        scores, (1, 3), (1, 4), origins=origins, mode="gaussian", sigma=0.5
    )
    near, off = 1.0, math.exp(-0.5 * (1 / 1.5) ** 2)
    between = [(near * 1 + off * 3) / (near + off), (off * 1 + near * 3) / (near + off)]
    assert result.flatten().tolist() == pytest.approx([1.0, *between, 3.0])


@every_dtype
def test_idw_is_exact_at_centres(dtype: torch.dtype, device: str) -> None:
    scores = torch.arange(9, device=device, dtype=dtype).reshape(1, 3, 3) / 4
    result = aggregate_patch_scores(scores, 3, 11, stride=4, mode="idw", power=3)
    assert torch.equal(result[:, 1::4, 1::4], scores)
    origins = torch.tensor([[0, 0], [0, 0], [0, 2]])
    twice = torch.tensor([[1.0, 2.0, 8.0]], device=device, dtype=dtype)
    result = aggregate_patch_scores(twice, (1, 1), (1, 3), origins=origins, mode="idw")
    assert result[0, 0].tolist() == [1.5, pytest.approx(11 / 3, rel=1e-2), 8.0]


@every_dtype
@pytest.mark.parametrize("power", [1e-3, 40.0, 300.0])
def test_idw_is_finite_for_any_power_on_a_large_image(
    dtype: torch.dtype, power: float, device: str
) -> None:
    scores = torch.tensor([[1.0, 2.0, 4.0]], device=device, dtype=dtype, requires_grad=True)
    origins = torch.tensor([[0, 0], [40, 1900], [7, 1000]])
    result = aggregate_patch_scores(scores, 8, (48, 1908), origins=origins, mode="idw", power=power)
    assert result.isfinite().all()
    assert result.min() >= 1
    assert result.max() <= 4
    (grad,) = torch.autograd.grad(result.float().mean(), scores)
    assert grad.isfinite().all()
    # With a huge power each pixel takes its nearest patch.
    if power > 1:
        assert result[0, 20, 200].item() == 1
        assert result[0, 20, 1800].item() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_the_nearest_and_ties_to_even(
    dtype: torch.dtype, device: str
) -> None:
    bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    number = bits.view(dtype)
    number = number[number.isfinite()]
    last = float(number[-1])
    for step in (1, 2, 3, 700):  # means of neighbours are ties, subnormal ones too
        pairs = torch.stack([number[:-step], number[step:]], 1)
        pairs = pairs[pairs[:, 1].float() < last / 2]
        scores = torch.cat([pairs, -pairs]).to(device)
        origins = torch.zeros(2, 2, dtype=torch.int64)
        got = aggregate_patch_scores(scores, 1, 1, origins=origins).flatten()
        assert torch.equal(got, (scores.float().sum(1) / 2).to(dtype))


@every_mode
def test_large_batch_equals_its_images_one_by_one(mode: str, device: str) -> None:
    scores = torch.randn(300, 3, 4, device=device)
    results = aggregate_patch_scores(scores, (4, 5), (8, 14), stride=(2, 3), mode=mode)
    for n in (0, 1, 150, 299):
        one = aggregate_patch_scores(scores[n : n + 1], (4, 5), (8, 14), stride=(2, 3), mode=mode)
        assert torch.equal(results[n : n + 1], one)


@every_mode
def test_many_rows_at_once_or_few_give_the_same_reference(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(2, 3, 3, dtype=torch.float64)
    args = [scores, None, [3, 3], [7, 7], [2, 2], mode, 0.25]
    whole = reference.aggregate_patch_scores(*args)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2 * 9 * 7 * 3)
    torch.testing.assert_close(reference.aggregate_patch_scores(*args), whole)


@every_mode
def test_no_images_give_no_maps_and_zero_gradients(mode: str, device: str) -> None:
    for shape, origins in (
        [(0, 2, 2), None],
        [(0, 4), torch.tensor([[0, 0], [0, 2], [2, 0], [2, 2]])],
    ):
        scores = torch.empty(shape, device=device, requires_grad=True)
        stride = 2 if origins is None else None
        result = aggregate_patch_scores(scores, 2, 4, stride=stride, origins=origins, mode=mode)
        assert result.shape == (0, 4, 4)
        (grad,) = torch.autograd.grad(result.sum(), scores)
        assert grad.shape == shape


def test_autocast_leaves_scores_alone(device: str) -> None:
    scores = torch.randn(1, 3, 3, device=device)
    plain = aggregate_patch_scores(scores, 3, 7, stride=2, mode="idw")
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(aggregate_patch_scores(scores, 3, 7, stride=2, mode="idw"), plain)


# Messages


def first_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value).splitlines()[0]


UNCOVERED = [
    # scores' shape, origins, patch, image, stride, first uncovered pixel
    ((1, 2, 2), None, (2, 2), (5, 5), (3, 3), (0, 2)),
    ((1, 2, 2), None, (2, 3), (5, 6), (3, 3), (2, 0)),
    ((1, 2, 2), None, (2, 2), (4, 5), (2, 2), (0, 4)),
    ((1, 2, 2), None, (2, 2), (5, 4), (2, 2), (4, 0)),
    ((1, 3), [[1, 0], [0, 1], [1, 1]], (1, 1), (2, 2), (1, 1), (0, 0)),
    ((1, 3), [[1, 1], [0, 1], [0, 0]], (1, 1), (2, 2), (1, 1), (1, 0)),
    ((1, 4), [[0, 0], [0, 3], [3, 0], [2, 2]], (3, 3), (6, 6), (1, 1), (3, 5)),
    ((0, 1), [[0, 0]], (2, 2), (2, 3), (1, 1), (0, 2)),
    ((1, 0), None, (2, 2), (2, 3), (1, 1), (0, 0)),
    ((1, 0, 3), None, (2, 2), (2, 3), (1, 1), (0, 0)),
]


@pytest.mark.parametrize("mode", ["mean", "gaussian", "max"])
@pytest.mark.parametrize(("shape", "origins", "patch", "image", "stride", "pixel"), UNCOVERED)
def test_uncovered_pixel_is_an_error_that_names_the_first(
    mode: str,
    shape: tuple[int, ...],
    origins: list[list[int]] | None,
    patch: tuple[int, int],
    image: tuple[int, int],
    stride: tuple[int, int],
    pixel: tuple[int, int],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)  # row by row
    listed = None if origins is None else torch.tensor(origins).reshape(-1, 2)
    if len(shape) == 2 and listed is None:
        listed = torch.empty(0, 2, dtype=torch.int64)
    arguments = [torch.zeros(shape, device=device), listed, patch, image, stride, mode, 0.5]
    for op in (native, reference.aggregate_patch_scores):
        with pytest.raises(ValueError, match="covered") as caught:
            op(*arguments)
        assert first_line(caught) == (
            "aggregate_patch_scores: expected every pixel to be covered by a patch, got none over "
            f"row {pixel[0]}, column {pixel[1]}"
        )


@pytest.mark.parametrize("side", [2**62, 2**63 - 1])
@pytest.mark.parametrize("sign", [1, -1])
@every_mode
def test_origins_near_the_end_of_int64_are_outside_the_image(
    side: int, sign: int, mode: str
) -> None:
    for axis in range(2):
        origins = torch.zeros(2, 2, dtype=torch.int64)
        origins[1, axis] = sign * side
        arguments = [torch.zeros(1, 2), origins, [3, 3], [3, 3], [1, 1], mode, 0.5]
        for op in (native, reference.aggregate_patch_scores):
            with pytest.raises(ValueError, match=f"every patch inside .* {sign * side}"):
                op(*arguments)


OUTSIDE = [
    ([[0, 0], [-1, 0]], (2, 2), (4, 4), "patch 1 of 2x2 at row -1, column 0"),
    ([[0, 0], [0, 3]], (2, 2), (4, 4), "patch 1 of 2x2 at row 0, column 3"),
    ([[3, 0], [0, -5]], (2, 2), (4, 4), "patch 0 of 2x2 at row 3, column 0"),
    ([[0, 0], [0, 0]], (5, 2), (4, 4), "patch 0 of 5x2 at row 0, column 0"),
]


@every_mode
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("origins", "patch", "image", "text"), OUTSIDE)
def test_patch_outside_the_image_is_an_error_that_names_the_first(
    mode: str,
    dtype: torch.dtype,
    origins: list[list[int]],
    patch: tuple[int, int],
    image: tuple[int, int],
    text: str,
    device: str,
) -> None:
    scores = torch.zeros(1, len(origins), device=device)
    arguments = [scores, torch.tensor(origins, dtype=dtype), patch, image, (1, 1), mode, 0.5]
    for op in (native, reference.aggregate_patch_scores):
        with pytest.raises(ValueError, match="inside") as caught:
            op(*arguments)
        assert first_line(caught) == (
            "aggregate_patch_scores: expected every patch inside the "
            f"{image[0]}x{image[1]} image, got {text}"
        )


def arguments_with(**changes: Any) -> list[Any]:
    good = {
        "scores": torch.zeros(2, 3, 3),
        "origins": None,
        "patch_size": [3, 3],
        "image_size": [7, 7],
        "stride": [2, 2],
        "mode": "mean",
        "parameter": 0.0,
    }
    return list({**good, **changes}.values())


LISTED = {"scores": torch.zeros(2, 4), "origins": torch.zeros(4, 2, dtype=torch.int64)}
BAD_CALLS = [
    (
        "scores to be float32, float64, float16 or bfloat16, got int32",
        {"scores": torch.zeros(2, 3, 3, dtype=torch.int32)},
    ),
    ("mode to be 'mean', 'gaussian', 'max' or 'idw', got 'min'", {"mode": "min"}),
    ("sigma to be at least 0.1 of the patch, got 0.05", {"mode": "gaussian", "parameter": 0.05}),
    ("sigma to be at least 0.1 of the patch, got inf", {"mode": "gaussian", "parameter": math.inf}),
    ("sigma to be at least 0.1 of the patch, got nan", {"mode": "gaussian", "parameter": math.nan}),
    ("power to be positive and finite, got 0", {"mode": "idw", "parameter": 0.0}),
    ("power to be positive and finite, got -2.5", {"mode": "idw", "parameter": -2.5}),
    ("power to be positive and finite, got inf", {"mode": "idw", "parameter": math.inf}),
    ("patch_size to be positive, got (0, 3)", {"patch_size": [0, 3]}),
    ("patch_size to be (height, width), got [3]", {"patch_size": [3]}),
    ("image_size to be positive, got (7, -1)", {"image_size": [7, -1]}),
    ("image_size to be (height, width), got [7, 7, 7]", {"image_size": [7, 7, 7]}),
    ("scores of shape (N, gh, gw) on a regular grid, got [2, 3]", {"scores": torch.zeros(2, 3)}),
    ("stride to be positive, got (2, 0)", {"stride": [2, 0]}),
    ("stride to be (height, width), got []", {"stride": []}),
    (
        "at least one patch, got 0",
        {"scores": torch.zeros(2, 0, 3), "mode": "idw", "parameter": 2.0},
    ),
    (
        "scores of shape (N, P) with origins, got [2, 3, 3]",
        {"origins": torch.zeros(9, 2, dtype=torch.int64)},
    ),
    ("origins to be int64 or int32, got float32", {**LISTED, "origins": torch.zeros(4, 2)}),
    (
        "origins of shape (4, 2), got [3, 2]",
        {**LISTED, "origins": torch.zeros(3, 2, dtype=torch.int64)},
    ),
    (
        "origins of shape (4, 2), got [4, 3]",
        {**LISTED, "origins": torch.zeros(4, 3, dtype=torch.int64)},
    ),
    (
        "at least one patch, got 0",
        {
            "scores": torch.zeros(2, 0),
            "origins": torch.zeros(0, 2, dtype=torch.int64),
            "mode": "idw",
            "parameter": 2.0,
        },
    ),
]


@pytest.mark.parametrize(("expected", "changes"), BAD_CALLS, ids=[text for text, _ in BAD_CALLS])
def test_native_fake_and_reference_say_the_same_about_a_bad_call(
    expected: str, changes: dict[str, Any], device: str
) -> None:
    assert_all_forms_say("aggregate_patch_scores", expected, arguments_with(**changes), device)


def test_stride_and_origins_exclude_each_other() -> None:
    scores, origins = torch.zeros(1, 1), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected exactly one of stride and origins, got both"):
        aggregate_patch_scores(scores, 2, 2, stride=1, origins=origins)
    with pytest.raises(ValueError, match="expected exactly one of stride and origins, got neither"):
        aggregate_patch_scores(scores, 2, 2)


@pytest.mark.parametrize("name", ["patch_size", "image_size", "stride"])
def test_public_function_takes_one_or_two_ints(name: str) -> None:
    settings: dict[str, Any] = {"patch_size": 3, "image_size": 7, "stride": 2, name: 2.0}
    expected = f"aggregate_patch_scores: expected {name} to be one or two ints, got 2.0"
    with pytest.raises(TypeError, match=re.escape(expected)):
        aggregate_patch_scores(torch.zeros(1, 3, 3), **settings)


def test_backward_op_names_a_bad_gradient() -> None:
    op = torch.ops.glance_ext.aggregate_patch_scores_backward
    rest = [torch.zeros(2, 3, 3), None, [3, 3], [2, 2], "mean", 0.0]
    start = "aggregate_patch_scores_backward: expected grad_map of "
    for shape in ([1, 7, 7], [7, 7]):
        expected = f"{start}shape (2, H, W), got {shape}"
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
            op(torch.zeros(shape), *rest)
    with pytest.raises(TypeError, match=f"^{start}the scores' float32, got float64"):
        op(torch.zeros(2, 7, 7).double(), *rest)
