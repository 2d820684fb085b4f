"""How activations and gradients travel between spans: few bytes a token, each token with scales of its own.

Decides bytes, error and what is refused. Pure functions on tensors of any device. Leaves messages to
`peer.pipeline.messages`, and which codec a run takes to its spec.

For N tokens of H values, little endian, the scales of all tokens first:

    fp32    H fp32 values a token                             exact
    bf16    H bfloat16 values a token                         within 2**-8 of each value
    int8    one fp32 scale, then H codes from -127 to 127     within scale * (1/2 + 2**-16), scale = max|x| / 127
    int4    one fp32 scale, a byte for each 16 values, then   within (max|block| / 14 + max|x| / 3570) * (1 + 2**-16)
            H codes from -7 to 7

A value is code * scale; in int4 the token's scale is max|x| / 7, and that of a block is its byte's share of it, out of
255, rounded up. Codes of 4 bits are two's complement, the first of two in the low half of a byte; the last half of an
odd token is 0. A token whose scale would be below 2**-126 is written as zeros. A scale is that of the token's largest
value, so a token has a code of the largest magnitude (in int4 a block of the largest share), or a scale of 0 and codes
of 0: all else is refused.

Where noise is given, int4 rounds up or down at random, right in the mean: then errors of gradients cancel over tokens
instead of adding up, and are up to twice as large. One scale a token and nearest rounding lost four times as
much of a model's loss (docs/benchmarks.md). The other codecs round to nearest.

Values up to 2**30 travel, a thousand times the largest that models are known for: with larger ones the sums and squares
of an honest replica overflow, and nothing can be learned from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from swarm.errors import DataError, ProtocolError

SCALE_BYTES = 4
BLOCK_VALUES = 16
"""of int4, under one share of a token's scale"""
LARGEST_VALUE = 2.0**30
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max
# The largest code times the largest scale must not exceed the largest value, as rounded in fp32.
_BELOW_ONE = 1 - 2**-22

_CANNOT_TRAVEL = "a value of a microbatch is not finite, or above 2**30"
_NO_ENCODER = "a token of a microbatch has a scale or codes that no encoder writes"


def can_travel(values: torch.Tensor) -> bool:
    """Whether all of them are finite and within `LARGEST_VALUE`."""
    return bool((values.detach().abs() <= LARGEST_VALUE).all())  # no comparison holds for NaN


Noise = Callable[[torch.Tensor], torch.Tensor]


def draw(values: torch.Tensor) -> torch.Tensor:
    """`Noise` for gradients."""
    return torch.rand_like(values)


class HopCodec(Protocol):
    """One way to write hidden states or their gradients."""

    def encoded_size(self, num_tokens: int, width: int) -> int:
        """Exact bytes of ``num_tokens`` tokens of ``width`` values."""
        ...

    def encode(self, values: torch.Tensor, noise: Noise | None = None) -> bytes:
        """``values`` [..., H] of any floating type. Raises `DataError` where one cannot travel.

        ``noise`` is wanted of gradients: a tensor -> numbers from 0 to 1 (1 excluded) of its shape and place.
        """
        ...

    def decode(self, data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
        """fp32 of ``shape`` [..., H] on the host, all of which could travel on.

        Raises `ProtocolError` for what no encoder writes.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Floats:
    """Values as they are, in ``dtype``."""

    dtype: torch.dtype
    as_integers: torch.dtype

    def encoded_size(self, num_tokens: int, width: int) -> int:
        return num_tokens * width * self.dtype.itemsize

    def encode(self, values: torch.Tensor, noise: Noise | None = None) -> bytes:
        rounded = values.detach().to(self.dtype)
        if not can_travel(rounded):
            raise DataError(_CANNOT_TRAVEL)
        return rounded.contiguous().view(self.as_integers).cpu().numpy().tobytes()

    def decode(self, data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
        _check_size(data, self, shape)
        raw = torch.frombuffer(bytearray(data), dtype=self.dtype)
        if not can_travel(raw):
            raise ProtocolError(_CANNOT_TRAVEL)
        return raw.to(torch.float32).view(shape)


@dataclass(frozen=True, slots=True)
class _Int8:
    """Codes from -127 to 127 under one scale a token."""

    def encoded_size(self, num_tokens: int, width: int) -> int:
        return num_tokens * (SCALE_BYTES + width)

    def encode(self, values: torch.Tensor, noise: Noise | None = None) -> bytes:
        rows_NH = values.detach().reshape(-1, values.shape[-1]).to(torch.float32)
        scales_N = _scales(rows_NH, 127)
        codes_NH = (rows_NH / _divisors(scales_N)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return _to_bytes(scales_N) + codes_NH.cpu().numpy().tobytes()

    def decode(self, data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
        _check_size(data, self, shape)
        num_tokens = int(np.prod(shape[:-1]))
        scales_N = _read_scales(data, num_tokens, 127)
        codes_NH = torch.frombuffer(bytearray(data[SCALE_BYTES * num_tokens :]), dtype=torch.int8).view(num_tokens, -1)
        lowest_N, highest_N = codes_NH.amin(1).to(torch.int16), codes_NH.amax(1).to(torch.int16)
        if not bool((torch.maximum(-lowest_N, highest_N) == torch.where(scales_N == 0, 0, 127)).all()):
            raise ProtocolError(_NO_ENCODER)  # -128 is above every wanted one
        return codes_NH.to(torch.float32).mul_(scales_N[:, None]).view(shape)


@dataclass(frozen=True, slots=True)
class _Int4:
    """Codes from -7 to 7 in blocks of 16, each with a share of its token's scale."""

    def encoded_size(self, num_tokens: int, width: int) -> int:
        return num_tokens * (SCALE_BYTES + _num_blocks(width) + -(-width // 2))

    def encode(self, values: torch.Tensor, noise: Noise | None = None) -> bytes:
        rows_NH = values.detach().reshape(-1, values.shape[-1]).to(torch.float32)
        num_tokens, width = rows_NH.shape
        scales_N = _scales(rows_NH, 7)
        divisors_N = _divisors(scales_N)
        padding = _num_blocks(width) * BLOCK_VALUES - width
        blocks_NKB = torch.nn.functional.pad(rows_NH, (0, padding)).view(num_tokens, -1, BLOCK_VALUES)
        highest_NK = blocks_NKB.abs().amax(2).mul_(scales_N[:, None] > 0)
        shares_NK = (highest_NK / (divisors_N * 7)[:, None] * 255).ceil_().clamp_(max=255).to(torch.uint8)
        codes_NKB = blocks_NKB / _divisors(_block_scales(scales_N, shares_NK))[:, :, None]
        codes_NKB = codes_NKB.round_() if noise is None else codes_NKB.add_(noise(codes_NKB)).floor_()
        codes_NH = codes_NKB.clamp_(-7, 7).to(torch.int8).view(num_tokens, -1)[:, :width]
        return _to_bytes(scales_N) + shares_NK.cpu().numpy().tobytes() + _pack(codes_NH).cpu().numpy().tobytes()

    def decode(self, data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
        _check_size(data, self, shape)
        width, num_tokens = shape[-1], int(np.prod(shape[:-1]))
        num_blocks = _num_blocks(width)
        scales_N = _read_scales(data, num_tokens, 7)
        body = torch.frombuffer(bytearray(data[SCALE_BYTES * num_tokens :]), dtype=torch.uint8)
        shares_NK = body[: num_tokens * num_blocks].view(num_tokens, num_blocks)
        codes_NH = _unpack(body[num_tokens * num_blocks :].view(num_tokens, -1), width)
        scales_NH = _block_scales(scales_N, shares_NK).repeat_interleave(BLOCK_VALUES, 1)[:, :width]
        is_full_N = shares_NK.amax(1) == torch.where(scales_N == 0, 0, 255)
        if not bool(is_full_N.all()) or bool((codes_NH == -8).any()) or bool(codes_NH[scales_NH == 0].any()):
            raise ProtocolError(_NO_ENCODER)
        return codes_NH.to(torch.float32).mul_(scales_NH).view(shape)


def _scales(rows_NH: torch.Tensor, largest: int) -> torch.Tensor:
    """Of each token, so that its largest value has the code ``largest``; 0 where that would be subnormal."""
    highest_N = rows_NH.abs().amax(1)  # NaN and infinity survive a maximum
    if not can_travel(highest_N):
        raise DataError(_CANNOT_TRAVEL)
    scales_N = (highest_N / largest).clamp_(max=_largest_scale(largest))
    return scales_N.masked_fill_(scales_N < _TINY, 0.0)


def _read_scales(data: bytes, num_tokens: int, largest: int) -> torch.Tensor:
    scales_N = torch.from_numpy(np.frombuffer(data, "<f4", num_tokens).astype(np.float32))
    if bool((scales_N > _largest_scale(largest)).any()):
        raise ProtocolError(_CANNOT_TRAVEL)
    if not bool(((scales_N == 0) | (scales_N >= _TINY)).all()) or bool(torch.signbit(scales_N).any()):
        raise ProtocolError(_NO_ENCODER)
    return scales_N


def _block_scales(scales_N: torch.Tensor, shares_NK: torch.Tensor) -> torch.Tensor:
    return scales_N[:, None] * (shares_NK.to(torch.float32) / 255)


def _num_blocks(width: int) -> int:
    return -(-width // BLOCK_VALUES)


def _largest_scale(largest: int) -> float:
    return LARGEST_VALUE / largest * _BELOW_ONE


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    """What to divide by: a scale of 0 makes every code 0."""
    return scales.masked_fill(scales == 0, _HUGE)


def _to_bytes(scales: torch.Tensor) -> bytes:
    return scales.cpu().numpy().astype("<f4").tobytes()


def _pack(codes_NH: torch.Tensor) -> torch.Tensor:
    """Two codes of 4 bits a byte, the first in the low half."""
    if codes_NH.shape[1] % 2:
        codes_NH = torch.nn.functional.pad(codes_NH, (0, 1))
    halves = codes_NH.view(torch.uint8)
    return (halves[:, ::2] & 15) | (halves[:, 1::2] << 4)


def _unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    both = torch.stack([packed & 15, packed >> 4], dim=2).view(len(packed), -1).view(torch.int8)
    if width % 2 and bool(both[:, -1].any()):
        raise ProtocolError("a token of a microbatch has unused bits that are set")
    both = both[:, :width]
    return both - ((both & 8) << 1)


def _check_size(data: bytes, codec: HopCodec, shape: tuple[int, ...]) -> None:
    if len(shape) < 2 or min(shape) < 1:
        raise ProtocolError(f"no hidden states have the shape {shape}")
    wanted = codec.encoded_size(int(np.prod(shape[:-1])), shape[-1])
    if len(data) != wanted:
        raise ProtocolError(f"hidden states of {len(data)} bytes where {wanted} are wanted")


HOP_CODECS: Mapping[str, HopCodec] = {
    "fp32": _Floats(torch.float32, torch.int32),
    "bf16": _Floats(torch.bfloat16, torch.int16),
    "int8": _Int8(),
    "int4": _Int4(),
}
