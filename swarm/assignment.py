"""What a peer reads: a pure function of (run seed, peer id, round, step), so that anybody can recompute it.

One token shard per (peer, round) keeps a peer's downloads small; inside it, steps draw sequences without replacement
as long as the shard lasts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """``sequences`` are indices within token shard ``token_shard``; sequence i is tokens [i*L, i*L + L + 1)."""

    token_shard: int
    sequences: tuple[int, ...]


def token_shard_of(seed: int, peer_key: bytes, round_number: int, shard_sequences: Sequence[int]) -> int:
    """The token shard that a peer reads in a round, drawn in proportion to the sequences each holds.

    Raises `DataError` where no token shard holds a sequence.
    """
    total = sum(shard_sequences)
    if total < 1:
        raise DataError("no token shard holds a whole sequence", "use a shorter sequence_length or more text")
    target = _draw(seed, peer_key, round_number, b"shard") % total
    for index, count in enumerate(shard_sequences[:-1]):
        if target < count:
            return index
        target -= count
    return len(shard_sequences) - 1


def reading(
    seed: int, peer_key: bytes, round_number: int, step: int, shard_sequences: Sequence[int], batch: int
) -> Reading:
    """The ``batch`` sequences of inner step ``step`` (from 0). ``shard_sequences``: sequences in each token shard.

    The order within a shard is an affine permutation i -> (a*i + b) mod n with a coprime to n, keyed by the round.
    """
    index = token_shard_of(seed, peer_key, round_number, shard_sequences)
    num_sequences = shard_sequences[index]
    key = _draw(seed, peer_key, round_number, b"order")
    stride, offset = _coprime(key >> 64, num_sequences), key % num_sequences
    first = step * batch
    chosen = tuple((stride * (first + i) + offset) % num_sequences for i in range(batch))
    return Reading(token_shard=index, sequences=chosen)


def _draw(seed: int, peer_key: bytes, round_number: int, purpose: bytes) -> int:
    key = b"swarm.v1 data" + seed.to_bytes(8, "big") + peer_key + round_number.to_bytes(8, "big") + purpose
    return int.from_bytes(hashlib.sha256(key).digest()[:16], "big")


def _coprime(value: int, modulus: int) -> int:
    candidate = value % modulus or 1
    while math.gcd(candidate, modulus) != 1:
        candidate += 1
    return candidate
