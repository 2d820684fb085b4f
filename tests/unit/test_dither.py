"""Noise for rounding: odd, evenly likely, and over consecutive steps so even that errors do not add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peer.training.dither import STRIDE, TABLE_VALUES, Dither, random_noise
from peer.training.quantized import quantise_


def dither(seed: int = 0) -> Dither:
    return Dither(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step", [0, 1, 2**15, 10**9])
def test_noise_is_odd_int16_at_every_step(step: int) -> None:
    """So it never reaches half a code, and never is 0."""
    noise = dither().noise(1000, step)
    assert noise.dtype == torch.int16 and len(noise) == 1000
    assert (noise & 1).all()


def test_every_number_has_its_turn_for_every_value() -> None:
    """What makes rounding right on average over steps: 2**15 of them visit each odd number once."""
    made = dither()
    seen = np.array([made.noise(3, step).numpy() for step in range(2**15)])
    for column in seen.T:
        assert len(np.unique(column)) == 2**15


def test_a_table_shorter_than_the_values_is_repeated() -> None:
    noise = dither().noise(TABLE_VALUES + 5, 7)
    assert torch.equal(noise[:5], noise[TABLE_VALUES:])


def test_other_seeds_make_other_noise_and_the_same_seed_the_same() -> None:
    """Two replicas that round alike would not average their errors out."""
    assert torch.equal(dither(1).noise(100, 3), dither(1).noise(100, 3))
    assert not torch.equal(dither(1).noise(100, 3), dither(2).noise(100, 3))


def walked(moved: np.ndarray, steps: int, made: Dither | torch.Generator) -> np.ndarray:
    """Errors, in codes, of weights that each step moves by ``moved`` codes and rounds. One value holds the scale."""
    weights = torch.zeros(256)
    weights[0] = 127.0
    codes, scales = torch.zeros(256, dtype=torch.int8), torch.zeros(1)
    for step in range(steps):
        weights[1:] += torch.from_numpy(moved)
        noise = made.noise(256, step) if isinstance(made, Dither) else random_noise(256, made)
        quantise_(weights.clone(), codes, scales, noise)
        weights = codes.to(torch.float32)
    return weights[1:].numpy() - steps * moved


def test_errors_of_many_steps_stay_within_a_few_codes() -> None:
    """A hundred steps: at most 3 codes for every fraction, where fresh noise is far outside for some of them."""
    moved = np.linspace(-1, 1, 255, dtype=np.float32)
    spread = [np.abs(walked(moved, 100, dither(seed))) for seed in range(5)]
    assert np.max(spread) < 3
    assert np.sqrt(np.mean(np.square(spread))) < 0.8
    fresh = walked(moved, 100, torch.Generator().manual_seed(0))
    assert np.abs(fresh).max() > 6 and np.sqrt(np.mean(np.square(fresh))) > 2.5


def test_the_stride_is_the_golden_ratio_to_16_bits() -> None:
    """Any other would serve some fractions badly."""
    assert abs(STRIDE / 2**16 - (5**0.5 - 1) / 2) < 2**-15


def test_each_step_alone_rounds_right_on_average() -> None:
    """False alarms: below 1 in a million (64 fractions and 3 steps, each for 2**17 values, Hoeffding's bound)."""
    fractions, made = (np.arange(64) + 0.5) / 64, dither(17)
    allowed = np.sqrt(np.log(2 * 64 * 3 / 1e-6) / (2 * TABLE_VALUES)) + 2**-15
    for step in (1, 2, 1000):
        noise = made.noise(TABLE_VALUES, step).numpy() / 2**16
        rounded_up = np.array([(noise + fraction > 0.5).mean() for fraction in fractions])
        assert np.abs(rounded_up - fractions).max() < allowed
