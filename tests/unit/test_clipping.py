"""The norm of a gradient as its tensors come: never too small, exact at the end, and right for steady proportions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.training.clipping import EVEN, NormSoFar, first_shares, next_shares, scale


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=50))
def test_shares_sum_to_one_whatever_the_gradients_were(squared_norms: list[float]) -> None:
    """So the norm of the whole is known, not estimated, when the last tensor has come."""
    shares = first_shares(len(squared_norms))
    for _ in range(3):
        shares = next_shares(shares, squared_norms)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= EVEN / len(shares) * 0.99


@given(st.lists(st.floats(0, 1e15), min_size=1, max_size=50), st.lists(st.floats(0, 1e15), min_size=50, max_size=50))
def test_no_tensor_is_left_with_more_than_the_allowed_norm(norms: list[float], before: list[float]) -> None:
    """Whatever the proportions were before; and the last of them is told the norm of the whole."""
    shares = next_shares(first_shares(len(norms)), [norm**2 for norm in before[: len(norms)]])
    so_far, told = NormSoFar(), 0.0
    for norm, share in zip(norms, shares, strict=True):
        told = so_far.with_tensor(norm**2, share)
        assert norm * scale(told, 1.0) <= 1.0
    assert told == pytest.approx(math.sqrt(sum(norm**2 for norm in norms)))


def test_steady_gradients_are_scaled_as_clipping_the_whole_would() -> None:
    """The first tensor already, but for the even share."""
    norms = [8.0, 1.0, 4.0]
    shares = first_shares(3)
    for _ in range(200):
        shares = next_shares(shares, [norm**2 for norm in norms])
    whole = math.sqrt(sum(norm**2 for norm in norms))
    so_far = NormSoFar()
    told = [so_far.with_tensor(norm**2, share) for norm, share in zip(norms, shares, strict=True)]
    assert told == [pytest.approx(whole, rel=0.06)] * 3


def test_a_gradient_within_the_allowed_norm_stays_as_it_is() -> None:
    """Clipping never makes a gradient larger."""
    assert scale(0.5, 1.0) == 1.0 and scale(0.0, 1.0) == 1.0
    assert scale(4.0, 1.0) == pytest.approx(0.25)


@pytest.mark.parametrize("strange", [[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_a_step_without_a_finite_gradient_changes_no_share(strange: list[float]) -> None:
    """Its proportions mean nothing."""
    assert next_shares([0.25, 0.75], strange) == [0.25, 0.75]
