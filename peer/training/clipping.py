"""Clipping without waiting for the whole gradient: its norm as the tensors that came so far tell it.

Pure. An 8-bit replica updates a matrix as soon as its gradient is there, before it knows the norm of the others. What
it knows are the squared norms of those that came before it in this step, and which share of the whole each tensor had
in the steps before. So the norm of the whole is estimated as what came, over the share that it usually has: exact for
the last tensor, and where gradients keep their proportions for all of them. No tensor is left with more than
``clip_norm``, whatever came: what came is never more than the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of the shares before, at each step: proportions of single steps are noise.
KEPT = 0.9
# Spread evenly, so that a tensor whose gradient was zero for long has a share when it has a gradient again.
EVEN = 0.1
# Below, proportions of squares are those of their rounding.
SMALLEST = 1e-60


@dataclass(slots=True)
class NormSoFar:
    """The norm of one step's gradient, told by its tensors one after the other."""

    squared: float = 0.0
    share: float = 0.0

    def with_tensor(self, squared_norm: float, share: float) -> float:
        """The norm of the whole as it seems with one more tensor, never less than what came; ``share`` is above 0."""
        self.squared += squared_norm
        self.share = min(1.0, self.share + share)
        return math.sqrt(self.squared / self.share)


def scale(norm: float, clip_norm: float) -> float:
    """What a gradient of this norm is multiplied by."""
    return min(1.0, clip_norm / (norm + 1e-6))


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
