"""Block-wise int8: what comes back, for which values it is exact, and that rounding is right on average."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peer.training.dither import random_noise
from peer.training.movement import BLOCK_VALUES
from peer.training.quantized import MAX_CODE, dequantise, num_blocks, quantise_
from swarm.errors import SwarmError

LARGEST = float(np.finfo(np.float32).max)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = hnp.arrays(np.float32, st.integers(0, 3 * BLOCK_VALUES + 5), elements=finite)


def quantised(values: np.ndarray, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty(len(values), dtype=torch.int8), torch.empty(num_blocks(len(values)))
    noise = None if seed is None else random_noise(len(values), torch.Generator().manual_seed(seed))
    quantise_(torch.from_numpy(values.copy()), codes, scales, noise)
    return codes, scales


def spread(scales: torch.Tensor, count: int) -> np.ndarray:
    return np.repeat(scales.numpy().astype(np.float64), BLOCK_VALUES)[:count]


@settings(max_examples=150, deadline=None)
@given(vectors, st.sampled_from([None, 1]))
def test_every_value_comes_back_within_a_step_of_its_block_and_finite(values: np.ndarray, seed: int | None) -> None:
    codes, scales = quantised(values, seed)
    back = dequantise(codes, scales).numpy().astype(np.float64)
    steps = spread(scales, len(values))
    assert np.isfinite(back).all() and (codes.abs() <= MAX_CODE).all()
    allowed = steps * ((0.5 if seed is None else 1.0) + 2**-14)
    # A block of tiny values becomes zeros; the largest value of all loses what its scale would overflow by.
    tiny = np.where(steps == 0, MAX_CODE * float(np.finfo(np.float32).tiny), 0.0)
    assert (np.abs(back - values) <= allowed + tiny + np.abs(values) * 2.0**-21).all()


@settings(max_examples=50, deadline=None)
@given(vectors)
def test_what_was_dequantised_once_is_kept_by_the_nearest_rounding(values: np.ndarray) -> None:
    codes, scales = quantised(values)
    once = dequantise(codes, scales).numpy()
    again, _ = quantised(once)
    assert torch.equal(again, codes)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("nothing", np.zeros(0)),
        ("zeros", np.zeros(300)),
        ("subnormal numbers", np.full(257, 1e-42)),
        ("the smallest normal numbers", np.full(5, np.finfo(np.float32).tiny)),
    ],
)
def test_values_too_small_for_a_scale_become_zeros(name: str, values: np.ndarray) -> None:
    codes, scales = quantised(values.astype(np.float32), seed=3)
    assert not codes.any() and not scales.any()


@pytest.mark.parametrize("values", [[LARGEST, -LARGEST, 0.0], [LARGEST] * 600])
def test_the_largest_numbers_stay_finite(values: list[float]) -> None:
    codes, scales = quantised(np.array(values, np.float32), seed=1)
    back = dequantise(codes, scales)
    assert torch.isfinite(back).all()
    assert back.numpy() == pytest.approx(values, rel=0.01)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 255, 256, 511, 512, 599])
def test_a_value_that_is_not_finite_is_an_error_and_nothing_is_written(wrong: float, place: int) -> None:
    values = torch.ones(600)
    values[place] = wrong
    codes, scales = torch.full((600,), 7, dtype=torch.int8), torch.full((3,), 7.0)
    with pytest.raises(SwarmError, match="not finite"):
        quantise_(values, codes, scales, None)
    assert (codes == 7).all() and (scales == 7).all()


@pytest.mark.parametrize(
    ("name", "values", "codes", "scales"),
    [
        ("another type", torch.zeros(4, dtype=torch.float64), 4, 1),
        ("too few codes", torch.zeros(4), 3, 1),
        ("too few scales", torch.zeros(257), 257, 1),
    ],
)
def test_vectors_that_do_not_fit_are_refused(name: str, values: torch.Tensor, codes: int, scales: int) -> None:
    with pytest.raises(SwarmError, match="quantise takes"):
        quantise_(values, torch.zeros(codes, dtype=torch.int8), torch.zeros(scales), None)


def test_stochastic_rounding_is_right_on_average() -> None:
    """False alarms: below 2 in a million (6000 values, each 4000 times, and the mean of all; Hoeffding's bound)."""
    rounds, values = 4000, np.random.default_rng(0).standard_normal(6000).astype(np.float32)
    total = np.zeros(len(values))
    generator = torch.Generator().manual_seed(11)
    codes, scales = torch.empty(len(values), dtype=torch.int8), torch.empty(num_blocks(len(values)))
    for _ in range(rounds):
        quantise_(torch.from_numpy(values.copy()), codes, scales, random_noise(len(values), generator))
        total += codes.numpy()
    steps = spread(scales, len(values))
    # P(|mean - expectation| > t steps) <= 2 exp(-2 rounds t^2) for values between two neighbouring codes.
    allowed = math.sqrt(math.log(2 * len(values) / 1e-6) / (2 * rounds)) + 2**-14
    assert (np.abs(total / rounds - values / steps) < allowed).all()
    # Each alone may be off by 5 % of a step; all together by far less (the same bound for the mean of all).
    mean_allowed = math.sqrt(math.log(2 / 1e-6) / (2 * rounds * len(values))) + 2**-14
    assert abs((total / rounds - values / steps).mean()) < mean_allowed


def test_nearest_rounding_would_fail_that_test_and_drops_small_steps() -> None:
    values = np.full(256, 10.4, np.float32)
    values[0] = 127.0
    nearest, _ = quantised(values)
    assert set(nearest[1:].tolist()) == {10}
    assert set(quantised(values, seed=0)[0][1:].tolist()) == {10, 11}


def test_what_was_a_code_is_kept_by_stochastic_rounding_too() -> None:
    """Every noise is drawn about 32 times: one that reached half a code would move some of them."""
    values = np.random.default_rng(2).standard_normal(1 << 20).astype(np.float32)
    codes, scales = quantised(values, seed=4)
    assert torch.equal(quantised(dequantise(codes, scales).numpy(), seed=5)[0], codes)


def test_the_same_seed_rounds_alike_and_another_does_not() -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    assert torch.equal(quantised(values, 5)[0], quantised(values, 5)[0])
    assert not torch.equal(quantised(values, 5)[0], quantised(values, 6)[0])


def test_bf16_values_are_the_fp32_values_rounded_once() -> None:
    codes, scales = quantised(np.random.default_rng(1).standard_normal(1000).astype(np.float32))
    assert torch.equal(dequantise(codes, scales, torch.bfloat16), dequantise(codes, scales).to(torch.bfloat16))
