"""glance_ext.testing: what it lets pass, and what it tells of what it does not."""

import pytest
import torch

from glance_ext.testing import FLOORS, assert_matches_reference

ONE = torch.ones(2, 3)
EXACT = ONE.double()
NAN, INF = float("nan"), float("inf")


def at(value: float, tensor: torch.Tensor = ONE) -> torch.Tensor:
    changed = tensor.clone()
    changed[1, 2] = value
    return changed


def test_error_may_be_twice_torchs_own_and_a_floor() -> None:
    same = at(1 + 1e-3)
    assert_matches_reference(at(1 + 1.9e-3), EXACT, same)
    assert_matches_reference(at(1 - 1.9e-3), EXACT, same)
    with pytest.raises(
        AssertionError, match=r"map: expected an error of at most 0\.002 .*got 0\.0021 at \[1, 2\]"
    ):
        assert_matches_reference(at(1 + 2.1e-3), EXACT, same, name="map")


@pytest.mark.parametrize("dtype", list(FLOORS), ids=str)
def test_floor_is_that_of_the_dtype_times_the_scale(dtype: torch.dtype) -> None:
    floor = FLOORS[dtype]
    zeros = torch.zeros(4, dtype=dtype)
    exact = zeros.double()
    assert_matches_reference(zeros + 0.9 * floor, exact, zeros)
    assert_matches_reference(zeros + 9 * floor, exact, zeros, scale=10)
    for value, scale in ((1.1 * floor, 1.0), (11 * floor, 10.0)):
        with pytest.raises(AssertionError, match="expected an error of at most"):
            assert_matches_reference(zeros + value, exact, zeros, scale=scale)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_passes_only_where_the_reference_has_the_same(value: float) -> None:
    special, exact = at(value), at(value, EXACT)
    assert_matches_reference(special, exact, special)
    with pytest.raises(AssertionError, match=r"result: expected 1 at \[1, 2\], got"):
        assert_matches_reference(special, EXACT, ONE)
    with pytest.raises(AssertionError, match=r"at \[1, 2\], got 1"):
        assert_matches_reference(ONE, exact, special)
    elsewhere = ONE.clone()
    elsewhere[0, 0] = value
    with pytest.raises(AssertionError, match="2 of 6 elements"):
        assert_matches_reference(elsewhere, exact, special)


def test_nan_never_passes_because_torch_has_one_too() -> None:
    with pytest.raises(AssertionError, match=r"expected 1 at \[1, 2\], got nan"):
        assert_matches_reference(at(NAN), EXACT, at(NAN))


def test_overflow_passes_where_torch_overflows_in_the_same_dtype() -> None:
    exact = at(7e4, EXACT)
    half = at(INF).half()
    assert_matches_reference(half, exact, half)
    with pytest.raises(AssertionError, match="got -inf"):
        assert_matches_reference(at(-INF).half(), exact, half)


def test_shapes_and_dtypes_have_to_agree() -> None:
    with pytest.raises(AssertionError, match=r"expected shape \(2, 3\), got \(1, 3\)"):
        assert_matches_reference(ONE[:1], EXACT, ONE)
    with pytest.raises(
        AssertionError, match=r"dtype of its reference, torch.float16, got torch.float32"
    ):
        assert_matches_reference(ONE, EXACT, ONE.half())
    with pytest.raises(AssertionError, match=r"expected a float64 reference, got torch.float32"):
        assert_matches_reference(ONE, ONE, ONE)
    assert_matches_reference(ONE[:0], EXACT[:0], ONE[:0])
