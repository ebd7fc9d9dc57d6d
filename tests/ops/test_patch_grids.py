"""aggregate_patch_scores on grids of uneven rows and columns, which take a path of their own."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glance_ext.ops import aggregate_patch_scores, reference
from glance_ext.testing import assert_matches_reference
from tests.ops.test_patch_scores import (
    MODES,
    Patches,
    every_dtype,
    every_mode,
    native,
    property_test,
    with_gradient,
)


@st.composite
def uneven_grids(draw: st.DrawFn, mode: str) -> Patches:
    """Every pair of some rows and some columns, in the order that the kernels for grids know."""
    seed, n = draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, 9))
    starts, patch, image = [], [], []
    for _ in range(2):
        side = draw(st.integers(1, 24))
        steps = draw(st.lists(st.integers(1, side), max_size=9))
        starts.append([0, *itertools.accumulate(steps)])
        patch.append(side)
        image.append(starts[-1][-1] + side)
    choices = [0.1, 0.25, 3.0] if mode == "gaussian" else [0.5, 2.0, 5.0, 8.0]
    parameter = draw(st.sampled_from(choices))
    origins = torch.tensor(list(itertools.product(*starts)))
    return Patches([n, len(origins)], origins, patch, image, [1, 1], parameter, seed)


@every_mode
@every_dtype
@property_test
@given(data=st.data())
def test_uneven_grid_matches_the_reference_forward_and_backward(
    mode: str, dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    patches = data.draw(uneven_grids(mode))
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


@every_mode
@property_test
@given(data=st.data())
def test_grid_in_any_other_order_gives_the_same_map_and_gradient(
    mode: str, device: str, data: st.DataObject
) -> None:
    """The kernels for grids against those for lists, which a shuffled grid takes."""
    patches = data.draw(uneven_grids(mode))
    scores = patches.scores(torch.float64).to(device)
    grad = torch.randn(scores.shape[0], *patches.image, dtype=torch.float64)
    args = patches.args(scores, mode)
    order = torch.tensor(data.draw(st.permutations(range(scores.shape[1]))), device=device)

    def run(scores: Tensor, origins: Tensor) -> list[Tensor]:
        leaf = scores.detach().requires_grad_()
        result = native(leaf, origins, *args[2:])
        return [result, *torch.autograd.grad(result, leaf, grad.to(result))]

    result, grads = run(scores, args[1])
    shuffled, shuffled_grads = run(scores[:, order], args[1][order])
    torch.testing.assert_close(shuffled, result)
    if mode != "max" or scores.shape[1] <= 256:  # beyond, equal scores go to the first
        torch.testing.assert_close(shuffled_grads, grads[:, order])


@every_mode
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_sick_score_of_the_papers_grid_stays_in_its_patch(
    mode: str, bad: float, device: str
) -> None:
    starts = torch.tensor([int(j * 223 / 19) for j in range(20)])
    origins = torch.cartesian_prod(starts, starts)
    scores = torch.rand(1, 400, device=device)
    healthy = aggregate_patch_scores(scores, 33, 256, origins=origins, mode=mode)
    sick = 20 * 7 + 11
    scores[0, sick] = bad
    result = aggregate_patch_scores(scores, 33, 256, origins=origins, mode=mode)
    row, column = origins[sick].tolist()
    inside = torch.zeros(1, 256, 256, dtype=torch.bool, device=device)
    inside[:, row : row + 33, column : column + 33] = True
    if mode == "idw":  # everywhere but on the others' centres
        inside[:] = True
        inside[:, starts[:, None] + 16, starts + 16] = False
        inside[:, row + 16, column + 16] = True
    assert torch.equal(result[~inside], healthy[~inside])
    if mode != "max" or bad != -float("inf"):
        assert not result[inside].isfinite().any()


def test_origins_that_change_in_place_are_seen(device: str) -> None:
    """What a call keeps of its origins is a copy of their values."""
    scores = torch.tensor([[1.0, 2.0]], device=device)
    origins = torch.tensor([[0, 0], [0, 1]])
    first = aggregate_patch_scores(scores, (1, 2), (1, 3), origins=origins)
    assert first.tolist() == [[[1.0, 1.5, 2.0]]]
    origins[0, 1], origins[1, 1] = 1, 0
    second = aggregate_patch_scores(scores, (1, 2), (1, 3), origins=origins)
    assert second.tolist() == [[[2.0, 1.5, 1.0]]]
    origins[0, 1] = 2
    with pytest.raises(ValueError, match="every patch inside"):
        aggregate_patch_scores(scores, (1, 2), (1, 3), origins=origins)


def test_many_grids_from_many_threads_do_not_mix(device: str) -> None:
    """More grids than are kept, each asked for by several threads at once."""

    def run(index: int) -> bool:
        stride, mode = 1 + index % 5, MODES[index % 4]
        scores = torch.full((1, 3, 3 + index % 7), float(index), device=device)
        size = (2 * stride + 5, (2 + index % 7) * stride + 5)
        result = aggregate_patch_scores(scores, 5, size, stride=stride, mode=mode)
        return bool(((result - index).abs() <= 1e-5 * index).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, [i // 3 for i in range(300)]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_mode
def test_cuda_graph_after_a_call_with_origins_on_the_cpu(mode: str) -> None:
    origins = torch.cartesian_prod(torch.tensor([0, 3, 4]), torch.tensor([0, 2, 4]))
    scores = torch.randn(2, 9, device="cuda")

    def call() -> Tensor:
        return aggregate_patch_scores(scores, 5, 9, origins=origins, mode=mode)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for index in range(40):  # other grids must not take what the graph reads
        aggregate_patch_scores(
            torch.randn(1, 2, 2, device="cuda"), 5, 6 + index % 5, stride=1 + index % 5
        )
    scores.copy_(torch.randn(2, 9))
    graph.replay()
    torch.testing.assert_close(result, call())
