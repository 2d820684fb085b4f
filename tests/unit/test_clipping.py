"""Shares of the allowed norm: they sum to one, follow the gradients, and leave nobody without."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.training.clipping import EVEN, first_shares, next_shares


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=50))
def test_shares_sum_to_one_whatever_the_gradients_were(squared_norms: list[float]) -> None:
    """So the norms that they allow never exceed the whole's."""
    shares = first_shares(len(squared_norms))
    for _ in range(3):
        shares = next_shares(shares, squared_norms)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= EVEN / len(shares) * 0.99


def test_steady_gradients_are_scaled_as_clipping_the_whole_would() -> None:
    """Each tensor's limit comes to its part of the norm, but for the even share."""
    norms = [8.0, 1.0, 4.0]
    shares = first_shares(3)
    for _ in range(200):
        shares = next_shares(shares, [norm**2 for norm in norms])
    whole = 1.0 / math.sqrt(sum(norm**2 for norm in norms))
    scales = [math.sqrt(share) / norm for share, norm in zip(shares, norms, strict=True)]
    assert scales[0] == pytest.approx(whole, rel=0.05) and scales[2] == pytest.approx(whole, rel=0.05)
    assert scales[1] > whole


@pytest.mark.parametrize("strange", [[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_a_step_without_a_finite_gradient_changes_no_share(strange: list[float]) -> None:
    """Its proportions mean nothing."""
    assert next_shares([0.25, 0.75], strange) == [0.25, 0.75]
