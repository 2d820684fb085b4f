"""The int8 wire codec: its size, its error bound, its bytes, and what it refuses."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peer.rounds.codec import CODECS, LARGEST_SCALE
from swarm.errors import ProtocolError, SwarmError

INT8 = CODECS["int8"]
TINY = float(np.finfo(np.float32).tiny)
HUGE = float(np.finfo(np.float32).max)

LENGTHS = [0, 1, 2, 255, 256, 257, 511, 512, 513, 65535, 65536, 65537, 200_001]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = hnp.arrays(np.float32, st.integers(0, 700), elements=finite, fill=st.just(np.float32(0)))


def bound(values: np.ndarray) -> np.ndarray:
    """Largest error allowed per value, computed in float64 from the codec's stated rule."""
    limits = np.empty(len(values), np.float64)
    for first in range(0, len(values), INT8.block_values):
        block = values[first : first + INT8.block_values].astype(np.float64)
        scale = np.abs(block).max() / 127
        limits[first : first + len(block)] = scale * (0.5 + 2**-16) if scale >= TINY * 1.001 else 127 * TINY
    return limits


@pytest.mark.parametrize("num_values", LENGTHS)
def test_every_length_decodes_within_the_bound_from_exactly_the_stated_bytes(num_values: int) -> None:
    values = np.random.default_rng(num_values).standard_normal(num_values).astype(np.float32)
    data = INT8.encode(values)
    assert len(data) == INT8.encoded_size(num_values) == num_values + 4 * math.ceil(num_values / 256)
    decoded = INT8.decode(data, num_values)
    assert decoded.dtype == np.float32 and decoded.flags.writeable
    assert (np.abs(decoded.astype(np.float64) - values) <= bound(values)).all()


@given(vectors)
@settings(max_examples=200, deadline=None)
def test_any_finite_vector_decodes_within_the_bound(values: np.ndarray) -> None:
    decoded = INT8.decode(INT8.encode(values), len(values))
    assert (np.abs(decoded.astype(np.float64) - values) <= bound(values)).all()


@given(vectors)
@settings(max_examples=50, deadline=None)
def test_encoding_what_was_decoded_changes_no_value_by_more_than_rounding(values: np.ndarray) -> None:
    once = INT8.decode(INT8.encode(values), len(values))
    twice = INT8.decode(INT8.encode(once), len(values))
    assert np.allclose(once, twice, rtol=1e-6, atol=127 * TINY)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("zeros stay zeros", [0.0, -0.0], [0.0, 0.0]),
        ("subnormal numbers become zeros", [1e-40, -1e-44], [0.0, 0.0]),
        ("the largest numbers survive", [HUGE, -HUGE], [HUGE, -HUGE]),
        ("halves round to even", [127.0, 0.5, 1.5, -2.5], [127.0, 0.0, 2.0, -2.0]),
    ],
)
def test_edges_of_the_number_range(name: str, values: list[float], expected: list[float]) -> None:
    decoded = INT8.decode(INT8.encode(np.array(values, np.float32)), len(values))
    assert np.allclose(decoded, expected, rtol=1e-6, atol=0), name


def test_the_bytes_are_little_endian_scales_and_then_codes() -> None:
    values = np.zeros(257, np.float32)
    values[:3], values[256] = [127, -1, 64.5], -254
    data = INT8.encode(values)
    assert data[:8] == struct.pack("<ff", 1.0, 2.0)
    assert data[8:11] == struct.pack("bbb", 127, -1, 64)
    assert data[-1:] == struct.pack("b", -127)


def test_one_outlier_spoils_only_its_own_block() -> None:
    values = np.full(512, 1e-3, np.float32)
    values[0] = 1e3
    decoded = INT8.decode(INT8.encode(values), 512)
    assert (decoded[1:256] == 0).all()
    assert np.allclose(decoded[256:], 1e-3, rtol=1e-5)


@pytest.mark.parametrize("hostile", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 300, 512])
def test_own_values_that_are_not_finite_are_not_sent(hostile: float, position: int) -> None:
    values = np.zeros(513, np.float32)
    values[position] = hostile
    with pytest.raises(SwarmError, match="not finite"):
        INT8.encode(values)


@pytest.mark.parametrize("values", [np.zeros(4), np.zeros((2, 2), np.float32)])
def test_another_type_or_shape_is_refused(values: np.ndarray) -> None:
    with pytest.raises(SwarmError, match="float32 vector"):
        INT8.encode(values)


GOOD = INT8.encode(np.linspace(-1, 1, 300, dtype=np.float32))
HOSTILE_BYTES = [
    ("empty", b"", 300),
    ("cut short", GOOD[:-1], 300),
    ("too long", GOOD + b"\0", 300),
    ("another length", GOOD, 299),
    ("a negative length", b"", -1),
    ("a NaN scale", struct.pack("<f", math.nan) + GOOD[4:], 300),
    ("an infinite scale", struct.pack("<f", math.inf) + GOOD[4:], 300),
    ("a negative scale", struct.pack("<f", -1.0) + GOOD[4:], 300),
    ("a negative zero scale", struct.pack("<f", -0.0) + GOOD[4:], 300),
    ("a subnormal scale", struct.pack("<f", 1e-40) + GOOD[4:], 300),
    ("a scale that overflows", struct.pack("<f", float(LARGEST_SCALE) * 1.01) + GOOD[4:], 300),
    ("a code of -128", GOOD[:-1] + b"\x80", 300),
]


@pytest.mark.parametrize(("name", "data", "num_values"), HOSTILE_BYTES, ids=[case[0] for case in HOSTILE_BYTES])
def test_bytes_that_no_encoder_writes_are_refused(name: str, data: bytes, num_values: int) -> None:
    with pytest.raises(ProtocolError):
        INT8.decode(data, num_values)


@given(st.binary(max_size=600), st.integers(0, 600))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_to_finite_values_or_are_refused(data: bytes, num_values: int) -> None:
    try:
        decoded = INT8.decode(memoryview(data), num_values)
    except ProtocolError:
        return
    assert len(decoded) == num_values and np.isfinite(decoded).all()


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=256), st.floats(TINY, float(LARGEST_SCALE), width=32))
@settings(max_examples=100, deadline=None)
def test_any_valid_block_decodes_to_one_multiplication_per_code(codes: list[int], scale: float) -> None:
    data = struct.pack("<f", scale) + struct.pack(f"{len(codes)}b", *codes)
    expected = np.array(codes, np.float32) * np.float32(scale)
    assert np.isfinite(expected).all()
    assert INT8.decode(data, len(codes)).tobytes() == expected.tobytes()
