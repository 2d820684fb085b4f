"""The outer step: its formula, its bits on every machine, and what it refuses."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.rounds.blocks import Blocks
from peer.rounds.outer import OuterStep, outer_step
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


def golden_state(num_values: int) -> tuple[np.ndarray, Blocks, np.ndarray]:
    anchor, values, gradient = golden_vectors(num_values)
    momentum = Blocks(num_values)
    momentum.write(slice(0, num_values), values, 0)
    return anchor, momentum, gradient


def step_of(lr: float, mu: float, number: int = 1) -> OuterStep:
    return OuterStep(learning_rate=lr, momentum_factor=mu, round=number)


def run_golden(num_values: int, rounds: int) -> tuple[np.ndarray, Blocks]:
    anchor, momentum, gradient = golden_state(num_values)
    for number in range(rounds):
        outer_step(anchor, momentum, 0, np.roll(gradient, number), step_of(0.8, 0.05 * number, number + 1))
    return anchor, momentum


def test_the_result_has_the_golden_bytes() -> None:
    """Anybody's machine must reproduce these bytes; another result there means another state digest."""
    anchor, momentum = run_golden(6, 3)
    assert anchor.astype("<f4").tobytes().hex() == "2df38bb7a9d692b86536ebbf0d9791bc606caabc38cd9fbc"
    assert momentum.data.tobytes().hex() == "cade3639000000010c7f"


def test_a_long_result_has_the_golden_digest() -> None:
    anchor, momentum = run_golden(70_001, 15)
    digest = hashlib.sha256(anchor.astype("<f4").tobytes() + momentum.data.tobytes()).hexdigest()
    assert digest == "03ca979e7503b39c5a54d94483fedfa81aa3e24308280dd1fbe7efba078b8fa8"


def test_the_formula_is_nesterov_momentum_with_every_operation_rounded() -> None:
    """On the momentum as it reads; the anchor moves by the new momentum before that is quantised."""
    anchor, momentum, gradient = golden_state(1000)
    lr, mu = np.float32(0.7), np.float32(0.9)
    exact = (mu * momentum.read(slice(0, 1000))).astype(np.float32) + gradient
    ahead = (mu * exact).astype(np.float32) + gradient
    expected_anchor = anchor - (lr * ahead).astype(np.float32)
    expected_momentum = Blocks(1000)
    expected_momentum.write(slice(0, 1000), exact, 5)
    outer_step(anchor, momentum, 0, gradient, step_of(0.7, 0.9, 5))
    assert momentum.data.tobytes() == expected_momentum.data.tobytes()
    assert anchor.tobytes() == expected_anchor.tobytes()


def test_without_momentum_and_with_rate_one_the_anchor_becomes_the_mean_of_the_replicas() -> None:
    anchor, replicas = np.full(4, 8, np.float32), [np.full(4, 4, np.float32), np.full(4, 6, np.float32)]
    momentum = Blocks(4)
    momentum.write(slice(0, 4), np.full(4, 30, np.float32), 1)
    average = np.mean([anchor - replica for replica in replicas], axis=0)
    outer_step(anchor, momentum, 0, average, step_of(1.0, 0.0))
    assert anchor.tolist() == [5.0] * 4
    # The pseudo-gradient, to its rounding: what was there before is gone.
    assert np.allclose(momentum.read(slice(0, 4)), 3.0, atol=3 / 127)


def movement_error_percent(mu: float, draw: Callable[[np.random.Generator], np.ndarray], part: slice) -> float:
    """How far 200 rounds with momentum in 8 bits end from the same rounds in float64, in percent of what they moved."""
    rng, num_values = np.random.default_rng(0), 1 << 14
    anchor, momentum = np.zeros(num_values, np.float32), Blocks(num_values)
    exact, exact_momentum = np.zeros(num_values), np.zeros(num_values)
    for number in range(1, 201):
        gradient = draw(rng).astype(np.float32)
        outer_step(anchor, momentum, 0, gradient, step_of(0.8, mu, number))
        exact_momentum = mu * exact_momentum + gradient
        exact -= 0.8 * (gradient + mu * exact_momentum)
    return float(100 * np.linalg.norm((anchor - exact)[part]) / np.linalg.norm(exact[part]))


def _white(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(1 << 14)


def _small_beside_large(rng: np.random.Generator) -> np.ndarray:
    """Every fourth value is moved by the same 0.01 every round, the others by noise of size 1."""
    values = rng.standard_normal(1 << 14)
    values[::4] = 0.01
    return values


@pytest.mark.parametrize(("mu", "at_most_percent"), [(0.8, 1.2), (0.9, 2.0)])
def test_what_momentum_in_8_bits_costs(mu: float, at_most_percent: float) -> None:
    """The anchor's movement over 200 rounds of a random walk, against exact momentum: figures of decision 0011."""
    error = movement_error_percent(mu, _white, slice(None))
    assert at_most_percent / 4 < error < at_most_percent


def test_small_steady_movement_beside_large_is_not_lost() -> None:
    """Rounding to the nearest loses most of it (70 % and more): its momentum never leaves 0."""
    assert movement_error_percent(0.9, _small_beside_large, slice(None, None, 4)) < 15


@given(st.integers(1, 2000), st.lists(st.integers(0, 8), max_size=4))
@settings(max_examples=50, deadline=None)
def test_whole_blocks_may_be_applied_in_any_cut(num_values: int, cuts: list[int]) -> None:
    anchor, momentum, gradient = golden_state(num_values)
    outer_step(anchor, momentum, 0, gradient, step_of(0.8, 0.5))
    cut_anchor, cut_momentum, _ = golden_state(num_values)
    edges = sorted({0, num_values, *(min(256 * cut, num_values) for cut in cuts)})
    for first, last in itertools.pairwise(edges):
        outer_step(cut_anchor, cut_momentum, first, gradient[first:last], step_of(0.8, 0.5))
    assert anchor.tobytes() == cut_anchor.tobytes() and momentum.data.tobytes() == cut_momentum.data.tobytes()


def test_the_pseudo_gradient_is_left_as_it_is() -> None:
    anchor, momentum, gradient = golden_state(1000)
    before = gradient.tobytes()
    outer_step(anchor, momentum, 0, gradient, step_of(0.8, 0.5))
    assert gradient.tobytes() == before


def test_hostile_averages_cannot_make_the_state_infinite() -> None:
    anchor, momentum = np.zeros(2, np.float32), Blocks(2)
    hostile = np.array([3.4e38, -3.4e38], np.float32)
    for number in range(200):
        outer_step(anchor, momentum, 0, hostile, step_of(2.0, 0.999, number))
    assert np.isfinite(anchor).all() and np.isfinite(momentum.read(slice(0, 2))).all()


@pytest.mark.parametrize(
    ("name", "anchor", "first", "gradient"),
    [
        ("an average beyond the end", np.zeros(300, np.float32), 256, np.zeros(45, np.float32)),
        ("another length than the momentum", np.zeros(299, np.float32), 0, np.zeros(299, np.float32)),
        ("double precision", np.zeros(300), 0, np.zeros(300)),
        ("two dimensions", np.zeros((300, 1), np.float32), 0, np.zeros((300, 1), np.float32)),
    ],
)
def test_vectors_that_do_not_fit_are_refused(name: str, anchor: np.ndarray, first: int, gradient: np.ndarray) -> None:
    with pytest.raises(SwarmError, match="the outer step takes"):
        outer_step(anchor, Blocks(300), first, gradient, step_of(0.8, 0.5))


@pytest.mark.parametrize(("first", "count"), [(1, 255), (0, 255), (256, 43)])
def test_a_step_within_a_block_is_refused(first: int, count: int) -> None:
    with pytest.raises(SwarmError, match="whole blocks"):
        outer_step(np.zeros(300, np.float32), Blocks(300), first, np.zeros(count, np.float32), step_of(0.8, 0.5))


def test_a_thread_that_flushes_subnormals_is_refused() -> None:
    import torch

    anchor, momentum, gradient = golden_state(8)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(SwarmError, match="subnormal"):
            outer_step(anchor, momentum, 0, gradient, step_of(0.8, 0.5))
    finally:
        torch.set_flush_denormal(False)
