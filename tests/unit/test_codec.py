"""The wire codecs: what all of them promise, and each one's bytes, size, error bound and refusals."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peer.rounds.codec import CODECS, Codec, Float32
from peer.rounds.codec_int8 import LARGEST_SCALE
from peer.rounds.planning import SLICE_VALUES
from swarm.errors import ProtocolError, SwarmError

TINY = float(np.finfo(np.float32).tiny)
HUGE = float(np.finfo(np.float32).max)

LENGTHS = [0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 4160, 65535, 65536, 65537, 200_001]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = hnp.arrays(np.float32, st.integers(0, 700), elements=finite, fill=st.just(np.float32(0)))
few_numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 3.0, TINY, -TINY / 2, 1e-44, HUGE, -HUGE])
vectors_of_few_numbers = st.lists(few_numbers, max_size=300).map(lambda numbers: np.array(numbers, np.float32))


def max_scale_bound(values: np.ndarray, block: int, largest_code: int, scale_slack: float) -> np.ndarray:
    """Per value: half a step of the block's scale, and the rounding of a division; computed in float64."""
    limits = np.empty(len(values), np.float64)
    for first in range(0, len(values), block):
        part = np.abs(values[first : first + block].astype(np.float64))
        scale = part.max() / largest_code * scale_slack
        limits[first : first + len(part)] = scale * (0.5 + 2**-16) if scale >= TINY * 1.001 else largest_code * TINY
    return limits


def assert_within_scale(values: Float32, decoded: Float32, block: int, largest_code: int, scale_slack: float) -> None:
    error = np.abs(decoded.astype(np.float64) - values)
    assert (error <= max_scale_bound(values, block, largest_code, scale_slack)).all()


def assert_norms_shrink(values: Float32, decoded: Float32, block: int, gained: float) -> None:
    """Per block: the squared error is at most 1 - ``gained`` of the squared norm, but for what underflows."""
    for first in range(0, len(values), block):
        part = values[first : first + block].astype(np.float64)
        error = decoded[first : first + block].astype(np.float64) - part
        limit = (1 - gained / len(part)) * (part**2).sum() + len(part) * 2.0**-252
        assert (error**2).sum() <= limit * (1 + 1e-12)


BOUNDS: dict[str, Callable[[Float32, Float32], None]] = {
    "int8": lambda values, decoded: assert_within_scale(values, decoded, 256, 127, 1.0),
    "int4": lambda values, decoded: assert_within_scale(values, decoded, 64, 7, 1 + 2**-7),
    "int2": lambda values, decoded: assert_norms_shrink(values, decoded, 128, 1 - 2**-16),
    "topk": lambda values, decoded: assert_norms_shrink(values, decoded, 4096, 0.0),
}
SIZES: dict[str, Callable[[int], int]] = {
    "int8": lambda n: 4 * math.ceil(n / 256) + n,
    "int4": lambda n: 2 * math.ceil(n / 64) + math.ceil(n / 2),
    "int2": lambda n: 4 * math.ceil(n / 128) + math.ceil(n / 4),
    "topk": lambda n: n // 4096 * 116 + topk_tail_size(min(64, n % 4096)),
}


def topk_tail_size(kept: int) -> int:
    return math.ceil(kept * 1.5) + 4 * bool(kept) + math.ceil(kept / 4)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
class TestEveryCodec:
    @pytest.mark.parametrize("num_values", LENGTHS)
    def test_every_length_decodes_within_the_bound_from_exactly_the_stated_bytes(
        self, codec: Codec, num_values: int
    ) -> None:
        """A vector of any length has the stated size and error."""
        values = np.random.default_rng(num_values).standard_normal(num_values).astype(np.float32)
        data = codec.encode(values)
        assert len(data) == codec.encoded_size(num_values) == SIZES[codec.name](num_values)
        decoded = codec.decode(data, num_values)
        assert decoded.dtype == np.float32 and decoded.flags.writeable and len(decoded) == num_values
        BOUNDS[codec.name](values, decoded)

    @given(values=vectors | vectors_of_few_numbers)
    @settings(max_examples=200, deadline=None)
    def test_any_finite_vector_decodes_within_the_bound(self, codec: Codec, values: np.ndarray) -> None:
        """Zeros, subnormal and huge numbers decode within the bound too, and never to a subnormal number."""
        data = codec.encode(values)
        codec.check(data, len(values))
        decoded = codec.decode(data, len(values))
        BOUNDS[codec.name](values, decoded)
        assert not ((decoded != 0) & (np.abs(decoded) < TINY)).any()

    @given(values=vectors | vectors_of_few_numbers)
    @settings(max_examples=100, deadline=None)
    def test_encoding_what_was_decoded_changes_nothing(self, codec: Codec, values: np.ndarray) -> None:
        """What was decoded encodes to the same bytes; int8, whose scales have 24 bits, to the same but for rounding."""
        data = codec.encode(values)
        once = codec.decode(data, len(values))
        again = codec.encode(once)
        if codec.name == "int8":
            assert np.allclose(once, codec.decode(again, len(values)), rtol=1e-6, atol=127 * TINY)
        else:
            assert again == data

    def test_zeros_stay_zeros_and_subnormal_numbers_become_zeros(self, codec: Codec) -> None:
        """A value that no scale can hold is 0."""
        values = np.array([0.0, -0.0, 1e-40, -1e-44] * 1100, np.float32)
        decoded = codec.decode(codec.encode(values), len(values))
        assert not decoded.any() and not np.signbit(decoded).any()

    def test_the_largest_numbers_stay_finite(self, codec: Codec) -> None:
        """Nothing overflows."""
        values = np.tile(np.array([HUGE, -HUGE], np.float32), 4000)
        decoded = codec.decode(codec.encode(values), len(values))
        sent = decoded != 0
        assert np.isfinite(decoded).all() and sent.any()
        assert np.allclose(decoded[sent], values[sent], rtol=2**-6)

    def test_one_outlier_spoils_only_its_own_block(self, codec: Codec) -> None:
        """The other blocks decode as if it were not there."""
        calm = np.random.default_rng(0).standard_normal(3 * codec.block_values).astype(np.float32)
        wild = calm.copy()
        wild[0] = 1e9
        size, middle = len(calm), slice(codec.block_values, None)
        assert (codec.decode(codec.encode(wild), size)[middle] == codec.decode(codec.encode(calm), size)[middle]).all()

    def test_blocks_divide_a_slice(self, codec: Codec) -> None:
        """A vector cut between slices decodes as the whole does."""
        assert SLICE_VALUES % codec.block_values == 0
        values = np.random.default_rng(1).standard_normal(2 * SLICE_VALUES + 77).astype(np.float32)
        pieces = [values[:SLICE_VALUES], values[SLICE_VALUES:]]
        apart = np.concatenate([codec.decode(codec.encode(piece), len(piece)) for piece in pieces])
        assert apart.tobytes() == codec.decode(codec.encode(values), len(values)).tobytes()

    @pytest.mark.parametrize("num_values", [1, 4096, 3 * 4096, 3 * 4096 + 77, 65_537])
    def test_a_cut_of_the_bytes_is_the_encoding_of_those_values(self, codec: Codec, num_values: int) -> None:
        """Between blocks, or up to the end, bytes can be cut out as if only these values had been encoded."""
        values = np.random.default_rng(2).standard_normal(num_values).astype(np.float32)
        data = codec.encode(values)
        places = [*range(0, num_values, codec.block_values), num_values]
        spans = {(0, num_values), (0, 0), (places[(len(places) - 1) // 2], num_values), *itertools.pairwise(places)}
        for first, last in spans:
            assert codec.cut(data, num_values, first, last) == codec.encode(values[first:last])

    @pytest.mark.parametrize("hostile", [math.nan, -math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("position", [0, 300, 4800, 4866])
    def test_own_values_that_are_not_finite_are_not_sent(self, codec: Codec, hostile: float, position: int) -> None:
        """NaN and infinities are an error with a name, wherever they are."""
        values = np.zeros(4867, np.float32)
        values[position] = hostile
        with pytest.raises(SwarmError, match="not finite"):
            codec.encode(values)

    @pytest.mark.parametrize("values", [np.zeros(4), np.zeros((2, 2), np.float32)])
    def test_another_type_or_shape_is_refused(self, codec: Codec, values: np.ndarray) -> None:
        """Codecs take one float32 vector."""
        with pytest.raises(SwarmError, match="float32 vector"):
            codec.encode(values)

    @pytest.mark.parametrize("num_values", [0, 1, 300, 5000])
    def test_another_size_is_refused(self, codec: Codec, num_values: int) -> None:
        """Bytes of another length, or another number of values, are refused."""
        data = codec.encode(np.linspace(-1, 1, num_values, dtype=np.float32))
        longer = num_values + 4 * codec.block_values
        for other, count in [(data[:-1], num_values), (data + b"\0", num_values), (data, longer), (data, -1)]:
            if other != data or count != num_values:
                with pytest.raises(ProtocolError):
                    codec.check(other, count)

    @given(data=st.data())
    @settings(max_examples=300, deadline=None)
    def test_any_bytes_decode_to_finite_values_or_are_refused(self, codec: Codec, data: st.DataObject) -> None:
        """Random or damaged bytes are refused by `check` and `decode` alike, or are what an encoder writes."""
        values = data.draw(vectors_of_few_numbers)
        damaged = bytearray(codec.encode(values))
        for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        try:
            codec.check(memoryview(damaged), len(values))
        except ProtocolError:
            with pytest.raises(ProtocolError):
                codec.decode(damaged, len(values))
            return
        decoded = codec.decode(memoryview(damaged), len(values))
        assert len(decoded) == len(values) and np.isfinite(decoded).all()
        if codec.name != "int8":
            assert codec.encode(decoded) == bytes(damaged)


GOLDEN = [
    ("int8", [127.0, -1.0, 64.5, 0.0], "0000803f" "7fff4000"),
    ("int4", [7.0, -1.0, 2.5, 0.0, -7.0], "803f" "f7" "02" "09"),
    ("int2", [1.0, -3.0, 1.0, -1.0, 3.0], "803f4040" "8c" "01"),
    ("int2", [0.0, -2.0, -0.0, 0.0], "00000040" "0c"),
    ("topk", [1.0, -3.0, 1.0], "001000" "0200" "803f4040" "0c"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "expected"), GOLDEN)
def test_the_bytes_are_as_written_down(name: str, values: list[float], expected: str) -> None:
    """A tiny example of each codec has these bytes, for ever."""
    assert CODECS[name].encode(np.array(values, np.float32)).hex() == expected


def test_topk_keeps_the_largest_of_each_chunk_and_the_first_of_equals() -> None:
    """64 values of each chunk survive: the largest, then equal ones from the front."""
    values = np.zeros(2 * 4096, np.float32)
    values[100:4096:60] = -5  # 67 equals: the last three are not sent
    values[4096:] = np.random.default_rng(3).standard_normal(4096)
    decoded = CODECS["topk"].decode(CODECS["topk"].encode(values), len(values))
    assert np.flatnonzero(decoded[:4096]).tolist() == list(range(100, 4096, 60))[:64]
    assert (decoded[100:3900:60] == -5).all()
    largest = np.sort(np.argsort(-np.abs(values[4096:]))[:64])
    assert np.flatnonzero(decoded[4096:]).tolist() == largest.tolist()
    assert (np.sign(decoded[4096:][largest]) == np.sign(values[4096:][largest])).all()


@pytest.mark.parametrize(
    ("name", "distribution", "largest_error"),
    [
        ("int4", "standard_normal", 0.11),
        ("int4", "laplace", 0.15),
        ("int2", "standard_normal", 0.345),
        ("int2", "laplace", 0.425),
        ("topk", "standard_normal", 0.94),
    ],
)
def test_errors_on_usual_values_stay_as_measured(name: str, distribution: str, largest_error: float) -> None:
    """The relative error on Gaussian and on heavy-tailed values is not above what the benchmark found."""
    values = getattr(np.random.default_rng(5), distribution)(size=1 << 17).astype(np.float32)
    decoded = CODECS[name].decode(CODECS[name].encode(values), len(values))
    assert np.linalg.norm(decoded - values) / np.linalg.norm(values) < largest_error


INT8_BYTES = CODECS["int8"].encode(np.linspace(-1, 1, 300, dtype=np.float32))


def int4(scale: int, *packed: int) -> bytes:
    return struct.pack("<H", scale) + bytes(packed)


def int2(low: int, high: int, *packed: int) -> bytes:
    return struct.pack("<HH", low, high) + bytes(packed)


def topk(places: str, low: int, high: int, *packed: int) -> bytes:
    return bytes.fromhex(places) + int2(low, high, *packed)


ONE, TWO = 0x3F80, 0x4000
REFUSED = [
    ("int8", "a NaN scale", struct.pack("<f", math.nan) + INT8_BYTES[4:], 300),
    ("int8", "an infinite scale", struct.pack("<f", math.inf) + INT8_BYTES[4:], 300),
    ("int8", "a negative scale", struct.pack("<f", -1.0) + INT8_BYTES[4:], 300),
    ("int8", "a negative zero scale", struct.pack("<f", -0.0) + INT8_BYTES[4:], 300),
    ("int8", "a subnormal scale", struct.pack("<f", 1e-40) + INT8_BYTES[4:], 300),
    ("int8", "a scale that overflows", struct.pack("<f", float(LARGEST_SCALE) * 1.01) + INT8_BYTES[4:], 300),
    ("int8", "a code of -128", INT8_BYTES[:-1] + b"\x80", 300),
    ("int8", "no largest code", struct.pack("<f", 1.0) + b"\x7e\x01", 2),
    ("int8", "codes under a scale of 0", bytes(4) + b"\x7f\x00", 2),
    ("int4", "a NaN scale", int4(0x7FC0, 0x17), 2),
    ("int4", "an infinite scale", int4(0x7F80, 0x17), 2),
    ("int4", "a scale that overflows", int4(0x7E13, 0x17), 2),
    ("int4", "a negative scale", int4(0xBF80, 0x17), 2),
    ("int4", "a negative zero scale", int4(0x8000, 0x00), 2),
    ("int4", "a subnormal scale", int4(0x007F, 0x17), 2),
    ("int4", "a code of -8", int4(ONE, 0x87), 2),
    ("int4", "no largest code", int4(ONE, 0x16), 2),
    ("int4", "codes under a scale of 0", int4(0, 0x17), 2),
    ("int4", "an end that is not 0", int4(ONE, 0x17), 1),
    ("int2", "an infinite level", int2(ONE, 0x7F80, 0b0100), 2),
    ("int2", "a subnormal level", int2(0x007F, ONE, 0b0100), 2),
    ("int2", "a negative level", int2(0xBF80, ONE, 0b0100), 2),
    ("int2", "levels in the wrong order", int2(TWO, ONE, 0b0100), 2),
    ("int2", "equal levels", int2(ONE, ONE, 0b0100), 2),
    ("int2", "no low value", int2(ONE, TWO, 0b0101), 2),
    ("int2", "no high value", int2(ONE, TWO, 0b0000), 2),
    ("int2", "a high value without its level", int2(ONE, 0, 0b0100), 2),
    ("int2", "a negative low of 0", int2(0, ONE, 0b0110), 2),
    ("int2", "an end that is not 0", int2(ONE, TWO, 0b010100), 2),
    ("topk", "places that fall", topk("010000", ONE, TWO, 0b0100), 2),
    ("topk", "a place twice", topk("011000", ONE, TWO, 0b0100), 2),
    ("topk", "a place beyond the end", topk("002000", ONE, TWO, 0b0100), 2),
    ("topk", "an end of places that is not 0", topk("0010000210", ONE, TWO, 0b0100), 3),
    ("topk", "values that int2 refuses", topk("001000", TWO, ONE, 0b0100), 2),
]


@pytest.mark.parametrize(("codec", "name", "data", "num_values"), REFUSED, ids=[f"{c[0]}: {c[1]}" for c in REFUSED])
def test_bytes_that_no_encoder_writes_are_refused(codec: str, name: str, data: bytes, num_values: int) -> None:
    """Each hostile example has the right size, and is refused by name when it arrives and when it is used."""
    assert len(data) == CODECS[codec].encoded_size(num_values), name
    for use in (CODECS[codec].check, CODECS[codec].decode):
        with pytest.raises(ProtocolError, match="no encoder writes"):
            use(data, num_values)


def test_places_of_zeros_other_than_the_first_are_refused() -> None:
    """Where fewer than 64 values are not 0, nobody chooses which zeros are sent."""
    values = np.zeros(4096, np.float32)
    values[77] = 1
    moved = bytearray(CODECS["topk"].encode(values))
    CODECS["topk"].check(moved, 4096)
    assert int.from_bytes(moved[93:96], "little") == 62 | 77 << 12  # the last of 63 zeros, and the value
    moved[93:96] = (63 | 77 << 12).to_bytes(3, "little")
    with pytest.raises(ProtocolError, match="places of zeros"):
        CODECS["topk"].check(moved, 4096)


@given(st.lists(st.integers(-127, 127), max_size=255), st.floats(TINY, float(LARGEST_SCALE), width=32))
@settings(max_examples=100, deadline=None)
def test_any_valid_block_of_int8_decodes_to_one_multiplication_per_code(codes: list[int], scale: float) -> None:
    """Decoding is one IEEE multiplication a value, the same bits everywhere."""
    codes = [127, *codes]
    data = struct.pack("<f", scale) + struct.pack(f"{len(codes)}b", *codes)
    expected = np.array(codes, np.float32) * np.float32(scale)
    assert np.isfinite(expected).all()
    assert CODECS["int8"].decode(data, len(codes)).tobytes() == expected.tobytes()


@given(st.lists(st.integers(-7, 7), max_size=63), st.integers(0x0080, 0x7E12))
@settings(max_examples=100, deadline=None)
def test_any_valid_block_of_int4_decodes_to_exact_products(codes: list[int], scale: int) -> None:
    """Code times scale has at most 24 bits, so its decoding rounds nothing."""
    codes = [-7, *codes]
    nibbles = [code & 15 for code in codes] + [0] * (len(codes) % 2)
    data = int4(scale, *(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)))
    exact = np.array(codes, np.float64) * struct.unpack("<f", struct.pack("<I", scale << 16))[0]
    assert CODECS["int4"].decode(data, len(codes)).astype(np.float64).tolist() == exact.tolist()
