"""The codecs of hidden states and gradients: exact sizes, stated errors, and refusal of what no encoder writes."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from peer.pipeline.hop_codec import HOP_CODECS, LARGEST_VALUE
from swarm.errors import DataError, ProtocolError
from swarm.run_spec import Pipeline

SHAPES = [(1, 1, 1), (1, 1, 2), (2, 3, 5), (2, 24, 16), (1, 7, 257), (3, 128, 64)]
SIZES = {
    "fp32": lambda n, h: 4 * n * h,
    "bf16": lambda n, h: 2 * n * h,
    "int8": lambda n, h: n * (4 + h),
    "int4": lambda n, h: n * (4 + math.ceil(h / 16) + math.ceil(h / 2)),
}
LARGEST = {"int8": 127, "int4": 7}
every_codec = pytest.mark.parametrize("name", HOP_CODECS)
every_scaled_codec = pytest.mark.parametrize("name", LARGEST)


def values_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Tokens of very different sizes: one scale for all would not do."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.logspace(-20, 8, shape[-2])[:, None]


def bound(name: str, values: torch.Tensor) -> torch.Tensor:
    """The stated error per value, in float64."""
    exact = values.double()
    if name == "fp32":
        return torch.zeros_like(exact)
    if name == "bf16":
        return exact.abs() * 2**-8
    highest = exact.abs().amax(-1, keepdim=True)
    if name == "int8":
        return (highest / 127 * (0.5 + 2**-16)).expand_as(exact)
    width = exact.shape[-1]
    blocks = torch.nn.functional.pad(exact, (0, -width % 16)).unflatten(-1, (-1, 16))
    own = blocks.abs().amax(-1).repeat_interleave(16, -1)[..., :width]
    return (own / 14 + highest / 3570) * (1 + 2**-16)


def test_a_run_may_choose_each_of_them_and_no_other() -> None:
    for name in HOP_CODECS:
        assert Pipeline.model_validate({"hop_codec": name}).hop_codec == name
    with pytest.raises(ValidationError, match="'fp32', 'bf16', 'int8' or 'int4'"):
        Pipeline.model_validate({"hop_codec": "int3"})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_codec
def test_what_is_encoded_has_the_stated_size_and_decodes_within_the_stated_error(
    name: str, shape: tuple[int, ...]
) -> None:
    codec, values = HOP_CODECS[name], values_of(shape)
    data = codec.encode(values)
    num_tokens = math.prod(shape[:-1])
    assert len(data) == codec.encoded_size(num_tokens, shape[-1]) == SIZES[name](num_tokens, shape[-1])
    decoded = codec.decode(data, shape)
    assert decoded.dtype == torch.float32 and decoded.shape == shape
    assert bool(((decoded.double() - values.double()).abs() <= bound(name, values)).all())


def test_int4_keeps_small_values_beside_a_large_one_in_another_block() -> None:
    values = torch.full((1, 1, 32), 0.01)
    values[..., 0] = 1.0
    decoded = HOP_CODECS["int4"].decode(HOP_CODECS["int4"].encode(values), (1, 1, 32))
    assert (decoded[..., 1:16] == 0).all(), "a sixteenth of a scale, beside the large one"
    assert ((decoded[..., 16:] - 0.01).abs() < 0.001).all()


def test_int4_with_noise_is_right_in_the_mean_and_within_twice_the_error() -> None:
    generator = torch.Generator().manual_seed(5)
    values, codec = values_of((1, 3, 40)), HOP_CODECS["int4"]

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator)

    decoded = torch.stack([codec.decode(codec.encode(values, noise), (1, 3, 40)) for _ in range(2000)]).double()
    once = bound("int4", values)
    assert bool(((decoded - values).abs() <= 2 * once).all())
    assert bool(((decoded.mean(0) - values).abs() <= 0.1 * once).all())
    nearest = codec.decode(codec.encode(values), (1, 3, 40))
    assert ((nearest - values).abs() > 0.5 * once).any(), "or the mean would show nothing"


@every_codec
def test_what_was_decoded_encodes_to_values_within_one_rounding(name: str) -> None:
    """A microbatch that is passed on twice loses nothing more worth a code."""
    codec, values = HOP_CODECS[name], values_of((2, 8, 33))
    once = codec.decode(codec.encode(values), (2, 8, 33))
    twice = codec.decode(codec.encode(once), (2, 8, 33))
    if name == "int4":  # shares are rounded up, so a block may get a finer scale the second time
        assert bool(((twice.double() - once).abs() <= bound(name, once)).all())
    else:
        assert torch.allclose(twice, once, rtol=1e-6, atol=0)


@every_codec
def test_zeros_and_bf16_tensors_travel(name: str) -> None:
    codec = HOP_CODECS[name]
    zeros = torch.zeros((2, 3, 4), dtype=torch.bfloat16)
    assert bool((codec.decode(codec.encode(zeros), (2, 3, 4)) == 0).all())


@every_codec
def test_values_beside_the_smallest_and_the_largest_number_stay_finite(name: str) -> None:
    codec = HOP_CODECS[name]
    values = torch.tensor([[[LARGEST_VALUE, -1.07e9, 1.0], [1e-38, -1e-40, 0.0], [1e-45, 0.0, 0.0]]])
    decoded = codec.decode(codec.encode(values), (1, 3, 3))
    assert codec.encode(decoded) and decoded.abs().max() <= LARGEST_VALUE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -1.1 * LARGEST_VALUE])
@every_codec
def test_a_value_that_is_not_finite_or_too_large_is_not_sent(name: str, bad: float) -> None:
    values = torch.ones(1, 2, 8)
    values[0, 1, 3] = bad
    with pytest.raises(DataError, match="not finite, or above"):
        HOP_CODECS[name].encode(values)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_value_above_the_largest_is_refused(name: str) -> None:
    values = torch.full((1, 2, 8), 3e38, dtype=torch.float32 if name == "fp32" else torch.bfloat16)
    data = values.view(torch.uint8).numpy().tobytes()
    with pytest.raises(ProtocolError, match="above"):
        HOP_CODECS[name].decode(data, (1, 2, 8))


@every_scaled_codec
def test_a_scale_of_values_above_the_largest_is_refused(name: str) -> None:
    data = bytearray(HOP_CODECS[name].encode(torch.ones(1, 2, 8)))
    data[4:8] = struct.pack("<f", 1.001 * LARGEST_VALUE / LARGEST[name])
    with pytest.raises(ProtocolError, match="above"):
        HOP_CODECS[name].decode(bytes(data), (1, 2, 8))


@pytest.mark.parametrize("change", [-1, 1, -8])
@every_codec
def test_another_number_of_bytes_is_refused(name: str, change: int) -> None:
    codec = HOP_CODECS[name]
    data = codec.encode(torch.ones(1, 2, 8))
    data = data[:change] if change < 0 else data + bytes(change)
    with pytest.raises(ProtocolError, match="bytes where"):
        codec.decode(data, (1, 2, 8))


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 8), (8,), (-1, 2, 8)], ids=str)
@every_codec
def test_a_shape_that_no_hidden_states_have_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="shape"):
        HOP_CODECS[name].decode(b"", shape)


BAD_SCALES = [math.nan, math.inf, -1.0, -0.0, 1e-40, 3e38]


@pytest.mark.parametrize("scale", BAD_SCALES, ids=str)
@every_scaled_codec
def test_a_scale_that_no_encoder_writes_is_refused(name: str, scale: float) -> None:
    codec = HOP_CODECS[name]
    data = bytearray(codec.encode(torch.ones(1, 2, 8)))
    data[4:8] = struct.pack("<f", scale)
    with pytest.raises(ProtocolError, match=r"no encoder writes|not finite"):
        codec.decode(bytes(data), (1, 2, 8))


# (codec, scale of the second of two tokens of 3 values, all that comes after it)
BAD_CODES = [
    ("int8", 1.0, bytes([0, 126, 0])),
    ("int8", 1.0, bytes([127, 0x80, 0])),
    ("int8", 0.0, bytes([0, 1, 0])),
    ("int4", 1.0, bytes([255, 254, 0x11, 0x01, 0x07, 0x00])),
    ("int4", 1.0, bytes([255, 0, 0x11, 0x01, 0x00, 0x00])),
    ("int4", 1.0, bytes([255, 255, 0x11, 0x01, 0x87, 0x00])),
    ("int4", 0.0, bytes([255, 255, 0x11, 0x01, 0x10, 0x00])),
    ("int4", 0.0, bytes([255, 0, 0x11, 0x01, 0x10, 0x00])),
    ("int4", 1.0, bytes([255, 255, 0x11, 0x01, 0x07, 0x10])),
]


@pytest.mark.parametrize(("name", "scale", "body"), BAD_CODES)
def test_codes_that_no_encoder_writes_are_refused(name: str, scale: float, body: bytes) -> None:
    codec = HOP_CODECS[name]
    good = codec.encode(torch.ones(1, 2, 3))
    data = good[:4] + struct.pack("<f", scale) + (good[8:11] if name == "int8" else b"") + body
    assert len(data) == len(good)
    with pytest.raises(ProtocolError):
        codec.decode(data, (1, 2, 3))


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(HOP_CODECS)), data=st.binary(min_size=0, max_size=64), width=st.integers(1, 9))
def test_hostile_bytes_decode_to_finite_values_or_are_refused(name: str, data: bytes, width: int) -> None:
    codec = HOP_CODECS[name]
    size = codec.encoded_size(2, width)
    try:
        decoded = codec.decode((data * size)[:size] if data else bytes(size), (1, 2, width))
    except ProtocolError:
        return
    assert bool(torch.isfinite(decoded).all())


def test_int8_keeps_each_tokens_own_scale() -> None:
    """A token a million times smaller than its neighbour arrives as exactly."""
    values = torch.stack([torch.full((8,), 1e3), torch.linspace(-1e-3, 1e-3, 8)])[None]
    decoded = HOP_CODECS["int8"].decode(HOP_CODECS["int8"].encode(values), (1, 2, 8))
    assert (decoded[0, 1] - values[0, 1]).abs().max().item() < 1e-5
