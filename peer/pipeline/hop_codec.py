"""How activations and gradients travel between spans: few bytes a token, each token with a scale of its own.

Decides bytes, error and what is refused. Pure functions on tensors of any device. Leaves messages to
`peer.pipeline.messages`, and which codec a run takes to its spec.

For N tokens of H values, little endian, the scales of all tokens first:

    fp32    H fp32 values a token                             exact
    bf16    H bfloat16 values a token                         within 2**-8 of each value
    int8    one fp32 scale, then H codes from -127 to 127     within scale * (1/2 + 2**-16), scale = max|x| / 127
    int4    one fp32 scale, then H codes from -7 to 7         the same with scale = max|x| / 7

A value is code * scale. Codes of 4 bits are two's complement, the first of two in the low half of a byte; the last half
of an odd token is 0. A token whose scale would be below 2**-126 is written as zeros. A scale is that of the token's
largest value, so a token has a code of the largest magnitude, or a scale of 0 and codes of 0: all else is refused.

Values up to 2**30 travel, a thousand times the largest that models are known for: with larger ones the sums and squares
of an honest replica overflow, and nothing can be learned from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from swarm.errors import DataError, ProtocolError

SCALE_BYTES = 4
LARGEST_VALUE = 2.0**30
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max
# The largest code times the largest scale must not exceed the largest value, as rounded in fp32.
_BELOW_ONE = 1 - 2**-22


_CANNOT_TRAVEL = "a value of a microbatch is not finite, or above 2**30"


def can_travel(values: torch.Tensor) -> bool:
    """Whether all of them are finite and within `LARGEST_VALUE`."""
    return bool((values.detach().abs() <= LARGEST_VALUE).all())  # no comparison holds for NaN


class HopCodec(Protocol):
    """One way to write hidden states or their gradients."""

    def encoded_size(self, num_tokens: int, width: int) -> int:
        """Exact bytes of ``num_tokens`` tokens of ``width`` values."""
        ...

    def encode(self, values: torch.Tensor) -> bytes:
        """``values`` [..., H] of any floating type. Raises `DataError` where one cannot travel."""
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

    def encode(self, values: torch.Tensor) -> bytes:
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
class _Scaled:
    """Codes from -``largest`` to ``largest``, 4 or 8 bits each, under one scale a token."""

    largest: int
    bits: int

    def encoded_size(self, num_tokens: int, width: int) -> int:
        return num_tokens * (SCALE_BYTES + self._row_bytes(width))

    def encode(self, values: torch.Tensor) -> bytes:
        rows_NH = values.detach().reshape(-1, values.shape[-1]).to(torch.float32)
        highest_N = rows_NH.abs().amax(1)  # NaN and infinity survive a maximum
        if not can_travel(highest_N):
            raise DataError(_CANNOT_TRAVEL)
        scales_N = (highest_N / self.largest).clamp_(max=self._largest_scale)
        scales_N.masked_fill_(scales_N < _TINY, 0.0)
        divisors_N = scales_N.masked_fill(scales_N == 0, _HUGE)
        codes_NH = (rows_NH / divisors_N[:, None]).round_().clamp_(-self.largest, self.largest).to(torch.int8)
        packed = codes_NH if self.bits == 8 else _pack(codes_NH)
        return scales_N.cpu().numpy().astype("<f4").tobytes() + packed.cpu().numpy().tobytes()

    def decode(self, data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
        _check_size(data, self, shape)
        width, num_tokens = shape[-1], int(np.prod(shape[:-1]))
        scales_N = torch.from_numpy(np.frombuffer(data, "<f4", num_tokens).astype(np.float32))
        body = torch.frombuffer(bytearray(data[SCALE_BYTES * num_tokens :]), dtype=torch.int8).view(num_tokens, -1)
        codes_NH = body if self.bits == 8 else _unpack(body, width)
        self._check(scales_N, codes_NH)
        return codes_NH.to(torch.float32).mul_(scales_N[:, None]).view(shape)

    def _check(self, scales_N: torch.Tensor, codes_NH: torch.Tensor) -> None:
        in_range_N = (scales_N == 0) | (scales_N >= _TINY)
        lowest_N, highest_N = codes_NH.amin(1).to(torch.int16), codes_NH.amax(1).to(torch.int16)
        wanted_N = torch.where(scales_N == 0, 0, self.largest)
        full_N = torch.maximum(-lowest_N, highest_N) == wanted_N  # -128 and -8 are above every wanted one
        if bool((scales_N > self._largest_scale).any()):
            raise ProtocolError(_CANNOT_TRAVEL)
        if not bool((in_range_N & full_N).all()) or bool(torch.signbit(scales_N).any()):
            raise ProtocolError("a token of a microbatch has a scale or codes that no encoder writes")

    @property
    def _largest_scale(self) -> float:
        return LARGEST_VALUE / self.largest * _BELOW_ONE

    def _row_bytes(self, width: int) -> int:
        return -(-width * self.bits // 8)


def _pack(codes_NH: torch.Tensor) -> torch.Tensor:
    """Two codes of 4 bits a byte, the first in the low half."""
    if codes_NH.shape[1] % 2:
        codes_NH = torch.nn.functional.pad(codes_NH, (0, 1))
    halves = codes_NH.view(torch.uint8)
    return (halves[:, ::2] & 15) | (halves[:, 1::2] << 4)


def _unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    halves = packed.view(torch.uint8)
    both = torch.stack([halves & 15, halves >> 4], dim=2).view(len(packed), -1).view(torch.int8)
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
    "int8": _Scaled(127, 8),
    "int4": _Scaled(7, 4),
}
