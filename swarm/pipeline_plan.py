"""Pipeline plan: how busy a peer of a span will be, and what bounds it, before anybody buys or starts anything.

Pure. Decides from sizes, a card's speed and a home's link how many tokens a second a span computes and how many its
link carries; leaves memory to `swarm.memory_plan`. It assumes that enough microbatches are in flight to hide every
wait, so it says what a peer can do at most.

A span sends hidden states onward and gradients back, each one value a byte and a scale a token (or as the hop codec
says): one of the two at either end of the model, both between. It receives as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from swarm.errors import ConfigError
from swarm.memory_plan import ModelNumbers, Working
from swarm.sharding import Span

# Bytes of a token of H values, times 2 as some are half bytes; scales come besides (peer.pipeline.hop_codec).
_HALF_BYTES: Mapping[str, int] = {"fp32": 8, "bf16": 4, "int8": 2, "int4": 1}
_SCALE_BYTES: Mapping[str, int] = {"fp32": 0, "bf16": 0, "int8": 4, "int4": 4}
_BLOCK_VALUES: Mapping[str, int] = {"int4": 16}
TOKEN_ID_BYTES = 4
# A multiplication and an addition for each value of a matrix and token: once there, twice back.
FLOPS_FORWARD = 2
FLOPS_BACKWARD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A peer's card and link: what they sustain, not what is printed on the box."""

    flops: float
    """operations a second in training"""
    uplink_bps: float
    downlink_bps: float

    def __post_init__(self) -> None:
        if min(self.flops, self.uplink_bps, self.downlink_bps) <= 0:
            raise ConfigError("a machine's speed and its link are above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSpeed:
    """Tokens a second of one peer that hosts ``span``, by what would bound it; infinite where nothing is to be done."""

    span: Span
    by_compute: float
    by_uplink: float
    by_downlink: float

    @property
    def tokens_per_s(self) -> float:
        return min(self.by_compute, self.by_uplink, self.by_downlink)

    @property
    def utilisation(self) -> float:
        """Share of the time that the peer computes."""
        return self.tokens_per_s / self.by_compute

    @property
    def bound_by(self) -> str:
        speeds = {"compute": self.by_compute, "uplink": self.by_uplink, "downlink": self.by_downlink}
        return min(speeds, key=lambda name: speeds[name])


def hop_bytes(width: int, codec: str) -> int:
    """Of one token, one way. Raises `ConfigError` for an unknown codec."""
    if codec not in _HALF_BYTES:
        raise ConfigError(f"no hop codec {codec[:20]!r}", f"choose one of: {', '.join(_HALF_BYTES)}")
    num_blocks = -(-width // _BLOCK_VALUES[codec]) if codec in _BLOCK_VALUES else 0
    return _SCALE_BYTES[codec] + num_blocks + -(-width * _HALF_BYTES[codec] // 2)


def flops_per_token(numbers: ModelNumbers, span: Span, working: Working) -> int:
    """Of one token there and back through ``span``, attention's products of tokens with tokens included."""
    used = [*numbers.layers[span.first : span.last], *([numbers.head] if span.has_head else [])]
    matrices = sum(math.prod(shape) for shapes in used for shape in shapes if len(shape) > 1)
    if span.has_head and numbers.is_tied:
        matrices += numbers.vocab * numbers.hidden  # listed with the embedding, where it is only looked up
    # Scores and values: each a product of the width with half of the sequence, as nobody looks ahead.
    attention = span.size * numbers.hidden * numbers.activations.sequence
    again = FLOPS_FORWARD if working.checkpointing else 0
    return (matrices + attention) * (FLOPS_FORWARD + FLOPS_BACKWARD + again)


def span_speed(numbers: ModelNumbers, span: Span, working: Working, machine: Machine, codec: str = "int8") -> SpanSpeed:
    """What one peer with this machine does of ``span``."""
    return speed_of(span, flops_per_token(numbers, span, working), numbers.hidden, machine, codec)


def speed_of(span: Span, token_flops: float, width: int, machine: Machine, codec: str) -> SpanSpeed:
    """The same by what a token takes in ``span``: operations, and hidden states of ``width`` values."""
    one_way = hop_bytes(width, codec)
    onward = 0 if span.has_head else one_way + TOKEN_ID_BYTES
    back = 0 if span.has_embedding else one_way
    # What it is sent: hidden states where it is not the first, gradients where it is not the last.
    received = (0 if span.has_embedding else one_way + TOKEN_ID_BYTES) + (0 if span.has_head else one_way)
    return SpanSpeed(
        span=span,
        by_compute=machine.flops / token_flops,
        by_uplink=_rate(machine.uplink_bps, onward + back),
        by_downlink=_rate(machine.downlink_bps, received),
    )


def _rate(bps: float, bytes_per_token: int) -> float:
    return bps / 8 / bytes_per_token if bytes_per_token else math.inf
