"""Vectors in 8 bits: their bound, their bias, and bytes that no encoder writes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peer.rounds import blocks
from peer.rounds.blocks import BLOCK_VALUES, MAX_CODE, TILE_VALUES, Blocks
from peer.rounds.planning import SLICE_VALUES
from swarm.errors import ProtocolError, SwarmError


def written(values: np.ndarray, round_number: int = 1) -> Blocks:
    kept = Blocks(len(values))
    kept.write(slice(0, len(values)), values, round_number)
    return kept


@given(
    hnp.arrays(np.float32, st.integers(1, 1500), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
def test_every_value_is_within_a_code_of_what_was_written(values: np.ndarray, round_number: int) -> None:
    """Huge, tiny, subnormal, and blocks of any length; what is written is what `check` accepts."""
    kept = written(values, round_number)
    kept.check()
    read = kept.read(slice(0, len(values)))
    scales = np.repeat(kept.scales.astype(np.float64), BLOCK_VALUES)[: len(values)]
    bound = np.where(scales == 0, float(np.finfo(np.float32).tiny) * MAX_CODE, scales * (1 + 2**-16))
    assert np.isfinite(read).all() and (np.abs(read.astype(np.float64) - values) <= bound).all()
    assert (read[values == 0] == 0).all()


def test_writing_again_what_was_read_keeps_scales_and_never_drifts_away() -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    kept = written(values)
    for number in range(2, 50):
        kept.write(slice(0, 5000), kept.read(slice(0, 5000)), number)
    assert np.abs(kept.read(slice(0, 5000)) - values).max() < 2 * kept.scales.max()


def test_rounding_is_right_on_average_over_rounds() -> None:
    """0.3 of a code, rounded 2,048 times, at 255 places; six deviations are allowed (sd 0.46 of one rounding)."""
    values = np.full(BLOCK_VALUES, 0.3, np.float32)
    values[0] = 127.0
    mean = np.mean([written(values, number).read(slice(0, BLOCK_VALUES))[1:] for number in range(2048)], axis=0)
    assert abs(mean.mean() - 0.3) < 6 * 0.46 / np.sqrt(2048 * 255)
    assert np.abs(mean - 0.3).max() < 6 * 0.46 / np.sqrt(2048)


def test_a_value_is_rounded_alike_wherever_its_slice_is_cut_from() -> None:
    values = np.random.default_rng(1).standard_normal(3 * TILE_VALUES + 500).astype(np.float32)
    whole, cut = written(values, 7), Blocks(len(values))
    for first in range(0, len(values), SLICE_VALUES):
        piece = slice(first, min(first + SLICE_VALUES, len(values)))
        cut.write(piece, values[piece], 7)
    assert whole.data.tobytes() == cut.data.tobytes()
    assert SLICE_VALUES % BLOCK_VALUES == 0, "a block is in one slice only"


def test_the_largest_quotient_never_rounds_to_a_code_that_is_too_large() -> None:
    """Any divisor, with the largest dither there is: the quotient of a block's largest value may be above 127."""
    largest = np.abs(np.random.default_rng(2).standard_normal(1 << 20)).astype(np.float32)
    quotients = largest / (largest / np.float32(MAX_CODE))
    assert quotients.max() > MAX_CODE
    assert np.rint(quotients + blocks._DITHER.max()).max() == MAX_CODE
    assert np.rint(quotients + blocks._DITHER.min()).min() == MAX_CODE


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 299])
def test_values_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    values = np.ones(300, np.float32)
    values[place] = bad
    with pytest.raises(SwarmError, match="not finite"):
        written(values)


def _scale(value: float) -> Callable[[Blocks], None]:
    def change(kept: Blocks) -> None:
        kept.scales[1] = value

    return change


def _code(value: int) -> Callable[[Blocks], None]:
    def change(kept: Blocks) -> None:
        kept.codes[256:] = value

    return change


HOSTILE = {
    "a scale that is no number": (_scale(np.nan), "scale"),
    "an infinite scale": (_scale(np.inf), "scale"),
    "a negative scale": (_scale(-1.0), "scale"),
    "a negative zero": (_scale(-0.0), "scale"),
    "a subnormal scale": (_scale(1e-40), "scale"),
    "a scale whose largest code is infinite": (_scale(3e38), "scale"),
    "a code of -128": (_code(-128), "code"),
    "a block whose largest code is small": (_code(3), "do not fit"),
    "codes without a scale": (_scale(0.0), "do not fit"),
    "a scale without codes": (_code(0), "do not fit"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bytes_that_no_encoder_writes_are_refused_by_name(case: str) -> None:
    change, told = HOSTILE[case]
    kept = written(np.random.default_rng(0).standard_normal(300).astype(np.float32))
    kept.check()
    change(kept)
    with pytest.raises(ProtocolError, match=told):
        kept.check()


def test_bytes_of_another_size_are_refused() -> None:
    with pytest.raises(ProtocolError, match="do not hold 300 values"):
        Blocks(300, np.zeros(307, np.uint8))
