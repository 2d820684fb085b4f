"""The outer step: its formula, its bits on every machine, and what it refuses."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.rounds import outer
from peer.rounds.outer import outer_step, weighted_mean
from swarm.errors import SwarmError


def golden_vectors(num_values: int) -> list[np.ndarray]:
    """Anchor, momentum and pseudo-gradient from integers alone: the same on every machine, with subnormals too."""
    index = np.arange(num_values, dtype=np.uint64)
    vectors = []
    for salt in (1, 2, 3):
        mixed = (index * np.uint64(2654435761) + np.uint64(salt * 40503)) * np.uint64(2246822519) % np.uint64(2**32)
        mantissa = (mixed >> np.uint64(8)).astype(np.int64) - 2**23
        exponent = (mixed % np.uint64(40)).astype(np.int32) - 60
        exponent[:: 37 + salt] = -155
        vectors.append(np.ldexp(mantissa.astype(np.float32), exponent).astype(np.float32))
    return vectors


def run_golden(num_values: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    anchor, momentum, gradient = golden_vectors(num_values)
    for step in range(rounds):
        outer_step(anchor, momentum, np.roll(gradient, step), 0.8, 0.05 * step)
    return anchor, momentum


def test_the_result_has_the_golden_bytes() -> None:
    """Anybody's machine must reproduce these bytes; another result there means another state digest."""
    anchor, momentum = run_golden(6, 3)
    assert anchor.astype("<f4").tobytes().hex() == "60488db7a9d692b86536ebbf169891bc606caabc96cc9fbc"
    assert momentum.astype("<f4").tobytes().hex() == "db520536fa99a63773e571319264e8380b33113b4171b53c"


def test_a_long_result_has_the_golden_digest() -> None:
    anchor, momentum = run_golden(70_001, 15)
    digest = hashlib.sha256(anchor.astype("<f4").tobytes() + momentum.astype("<f4").tobytes()).hexdigest()
    assert digest == "86ffde9328adc76bf222121ff689992457f229baaee58a3006493b6578c1be88"


def test_the_formula_is_nesterov_momentum_with_every_operation_rounded() -> None:
    anchor, momentum, gradient = golden_vectors(1000)
    lr, mu = np.float32(0.7), np.float32(0.9)
    expected_momentum = (mu * momentum).astype(np.float32) + gradient
    ahead = (mu * expected_momentum).astype(np.float32) + gradient
    expected_anchor = anchor - (lr * ahead).astype(np.float32)
    outer_step(anchor, momentum, gradient, 0.7, 0.9)
    assert momentum.tobytes() == expected_momentum.tobytes()
    assert anchor.tobytes() == expected_anchor.tobytes()


def test_without_momentum_and_with_rate_one_the_anchor_becomes_the_mean_of_the_replicas() -> None:
    anchor, replicas = np.full(4, 8, np.float32), [np.full(4, 4, np.float32), np.full(4, 6, np.float32)]
    momentum = np.full(4, 3, np.float32)
    outer_step(anchor, momentum, weighted_mean([anchor - replica for replica in replicas], [1, 1]), 1.0, 0.0)
    assert anchor.tolist() == [5.0] * 4
    assert momentum.tolist() == [3.0] * 4  # the pseudo-gradient: what was there before is gone


@given(st.integers(1, 400), st.lists(st.integers(0, 400), max_size=4))
@settings(max_examples=50, deadline=None)
def test_slices_may_be_applied_in_any_cut(num_values: int, cuts: list[int]) -> None:
    whole, pieces = golden_vectors(num_values), golden_vectors(num_values)
    outer_step(*whole, 0.8, 0.5)
    edges = sorted({0, num_values, *(min(cut, num_values) for cut in cuts)})
    for first, last in itertools.pairwise(edges):
        outer_step(*(vector[first:last] for vector in pieces), 0.8, 0.5)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, pieces, strict=True))


def test_the_pseudo_gradient_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "TILE_VALUES", 64)
    anchor, momentum, gradient = golden_vectors(1000)
    before = gradient.tobytes()
    outer_step(anchor, momentum, gradient, 0.8, 0.5)
    assert gradient.tobytes() == before


def test_hostile_averages_cannot_make_the_state_infinite() -> None:
    anchor, momentum = np.zeros(2, np.float32), np.zeros(2, np.float32)
    hostile = np.array([3.4e38, -3.4e38], np.float32)
    for _ in range(200):
        outer_step(anchor, momentum, hostile, 2.0, 0.999)
    assert np.isfinite(anchor).all() and np.isfinite(momentum).all()


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("unequal lengths", [np.zeros(2, np.float32), np.zeros(2, np.float32), np.zeros(3, np.float32)]),
        ("double precision", [np.zeros(2), np.zeros(2), np.zeros(2)]),
        ("two dimensions", [np.zeros((2, 2), np.float32)] * 3),
    ],
)
def test_vectors_of_another_kind_are_refused(name: str, vectors: list[np.ndarray]) -> None:
    with pytest.raises(SwarmError, match="three float32 vectors"):
        outer_step(*vectors, 0.8, 0.5)


def test_a_thread_that_flushes_subnormals_is_refused() -> None:
    import torch

    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(SwarmError, match="subnormal"):
            outer_step(*golden_vectors(8), 0.8, 0.5)
    finally:
        torch.set_flush_denormal(False)


def test_the_mean_weighs_by_tokens_and_sums_in_the_order_given() -> None:
    vectors = [np.array([value], np.float32) for value in (1e8, 1.0, -1e8)]
    expected = np.float32(0)
    for vector, weight in zip(vectors, (1, 2, 3), strict=True):
        expected = np.float32(expected + np.float32(np.float32(weight / 6) * vector[0]))
    assert weighted_mean(vectors, [1, 2, 3])[0] == expected


def test_a_mean_of_one_is_itself_and_of_many_tiles_is_complete() -> None:
    values = np.random.default_rng(0).standard_normal(70_001).astype(np.float32)
    assert weighted_mean([values], [7]).tobytes() == values.tobytes()
    assert np.allclose(weighted_mean([values, 3 * values], [1, 1]), 2 * values)


@pytest.mark.parametrize(
    ("name", "lengths", "weights"),
    [
        ("nobody", [], []),
        ("a weight missing", [2, 2], [1]),
        ("a weight of zero", [2, 2], [1, 0]),
        ("unequal lengths", [2, 3], [1, 1]),
    ],
)
def test_averages_without_sense_are_refused(name: str, lengths: list[int], weights: list[int]) -> None:
    with pytest.raises(SwarmError, match="an average needs"):
        weighted_mean([np.zeros(length, np.float32) for length in lengths], weights)
