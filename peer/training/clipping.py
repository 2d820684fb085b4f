"""Clipping without waiting for the whole gradient: how much of the allowed norm each tensor may take.

Pure. An 8-bit replica updates a matrix as soon as its gradient is there, before it knows the norm of the others. So
each of its tensors has a share of ``clip_norm ** 2``, by what it took of the gradients before: shares sum to 1, so
the whole clipped gradient never exceeds ``clip_norm``. Where gradients keep their proportions each tensor is scaled
as clipping the whole at once would scale it; equal shares would shrink the large gradients most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Of the shares before, at each step: proportions of single steps are noise.
KEPT = 0.9
# Spread evenly, so that a tensor whose gradient was zero for long may have one again.
EVEN = 0.1
# Below, proportions of squares are those of their rounding.
SMALLEST = 1e-60


def first_shares(num_tensors: int) -> list[float]:
    return [1 / num_tensors] * num_tensors


def next_shares(shares: Sequence[float], squared_norms: Sequence[float]) -> list[float]:
    """The shares after a step with ``squared_norms`` (before clipping); unchanged where they say nothing."""
    total = sum(squared_norms)
    if not SMALLEST < total < math.inf:
        return list(shares)
    even = EVEN / len(shares)
    taken = [(1 - EVEN) * squared / total + even for squared in squared_norms]
    return [KEPT * share + (1 - KEPT) * new for share, new in zip(shares, taken, strict=True)]
