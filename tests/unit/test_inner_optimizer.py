"""8-bit moments on the CPU: that our look-up gives bitsandbytes' codes, and our update what its own would give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peer.training import inner_optimizer
from peer.training.inner_optimizer import EPSILON, MOMENT_BLOCK, Moments, Update
from swarm.run_spec import Inner

CPU = torch.device("cpu")
# What rounding to fp16 before the look-up may cost, as a part of the value.
HALF = 2.0**-11
LARGEST = float(np.float32(1e18))
finite = st.floats(width=32, min_value=-LARGEST, max_value=LARGEST, allow_nan=False)


def encoded(values: np.ndarray, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full((len(values),), 77, dtype=torch.uint8)
    largest = torch.full((-(-len(values) // MOMENT_BLOCK),), 7.0)
    table = inner_optimizer._codes_of_halves(signed=signed)
    inner_optimizer._encode(torch.from_numpy(values.copy()), codes, largest, table)
    return codes, largest


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 2 * MOMENT_BLOCK + 5), elements=finite), st.booleans())
def test_a_moment_gets_the_code_that_stands_for_the_nearest_number(values: np.ndarray, signed: bool) -> None:
    values = values if signed else np.abs(values)
    codes, largest = encoded(values, signed=signed)
    numbers = inner_optimizer.code_maps(CPU)[0 if signed else 1].numpy().astype(np.float64)
    for first in range(0, len(values), MOMENT_BLOCK):
        block, top = values[first : first + MOMENT_BLOCK], float(largest[first // MOMENT_BLOCK])
        assert top == np.abs(block).max()
        if top < inner_optimizer.SMALLEST_BLOCK:
            assert (numbers[codes[first : first + MOMENT_BLOCK].numpy()] == 0).all()
            continue
        shares = block.astype(np.float64) / top
        off = np.abs(numbers[codes[first : first + MOMENT_BLOCK].numpy()] - shares)
        nearest = np.abs(numbers[None, :] - shares[:, None]).min(1)
        assert (off <= nearest + 2 * HALF * np.abs(shares) + 1e-11).all()


@pytest.mark.parametrize("num_values", [MOMENT_BLOCK, 3 * MOMENT_BLOCK, 3 * MOMENT_BLOCK + 5])
def test_an_update_from_equal_moments_is_that_of_bitsandbytes(num_values: int) -> None:
    """Codes may differ: those that bitsandbytes gives small numbers on the CPU are up to seven from the nearest."""
    inner, rate = Inner(), 1e-3
    generator = torch.Generator().manual_seed(0)
    moments = Moments(num_values, inner, CPU)
    weights = torch.randn(num_values, generator=generator)
    functional = inner_optimizer._bitsandbytes().functional
    signed, unsigned = inner_optimizer.code_maps(CPU)
    for step in range(1, 6):
        theirs, m, v, largest_m, largest_v = (t.clone() for t in (weights, *moments.tensors()))
        gradient = torch.randn(num_values, generator=generator)
        moments.update_(weights, gradient, 0, Update(inner=inner, learning_rate=rate, step=step, gradient_scale=0.5))
        functional.optimizer_update_8bit_blockwise(
            *("adam", gradient, theirs, m, v, inner.beta1, inner.beta2, 0.0, 0.0, EPSILON),
            *(step, rate, signed, unsigned, largest_m, largest_v),
            weight_decay=inner.weight_decay,
            gnorm_scale=0.5,
        )
        torch.testing.assert_close(weights, theirs, rtol=1e-6, atol=1e-4 * rate)
        torch.testing.assert_close(moments.tensors()[2:], [largest_m, largest_v], rtol=1e-5, atol=0.0)
