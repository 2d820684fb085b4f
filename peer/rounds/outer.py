"""The outer optimizer: how a committed average moves the anchor, bit for bit the same on every machine.

Decides the arithmetic: Nesterov momentum on pseudo-gradients (arXiv 2311.08105), in elementwise fp32, every
multiplication and addition rounded on its own. numpy runs one operation per call, so no compiler can fuse a
multiplication with an addition, and float32 scalars keep everything in float32. Leaves schedules to `swarm.schedule`,
slices and digests to `peer.rounds.shard`.

Two rules make the state the same everywhere and keep it finite:
- subnormal numbers are kept, as IEEE 754 has them: a thread whose processor flushes them is refused;
- an average is clipped to +-2**30, far above any movement that training makes, so the state can never reach an
  infinity or a NaN (whose bits differ between processors).

A part that was committed as *absent* is not applied at all: its slices of anchor and momentum stay as they are.
With a momentum factor of 0 the momentum becomes the pseudo-gradient and the step is plain averaging scaled by ``lr``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peer.rounds.codec import Float32
from swarm.errors import SwarmError

LARGEST_MOVEMENT = np.float32(2**30)
# Work on pieces that stay in cache; elementwise, so the size changes no result.
TILE_VALUES = 1 << 16


def outer_step(
    anchor: Float32, momentum: Float32, pseudo_gradient: Float32, learning_rate: float, momentum_factor: float
) -> None:
    """Move ``anchor`` and ``momentum`` in place by one committed average; all three are slices of equal length.

    ``momentum = mu * momentum + g`` and then ``anchor -= lr * (g + mu * momentum)``, where ``mu`` and ``lr`` are
    rounded to float32 first. Raises `SwarmError` for unequal shapes, other types, or a thread that flushes subnormals.
    """
    check_subnormals()
    for vector in (anchor, momentum, pseudo_gradient):
        if vector.dtype != np.float32 or vector.ndim != 1 or vector.shape != anchor.shape:
            raise SwarmError("the outer step takes three float32 vectors of one length")
    lr, mu = np.float32(learning_rate), np.float32(momentum_factor)
    scratch = np.empty((2, min(TILE_VALUES, len(anchor))), np.float32)
    for first in range(0, len(anchor), TILE_VALUES):
        span = slice(first, first + TILE_VALUES)
        _step_tile(anchor[span], momentum[span], pseudo_gradient[span], (lr, mu), scratch)


def weighted_mean(contributions: Sequence[Float32], weights: Sequence[int]) -> Float32:
    """The mean of ``contributions`` by ``weights`` (tokens), summed in the order given: the order of the members.

    Each is multiplied by float32(weight / total). Raises `SwarmError` for no contributions, unequal lengths, or
    weights that are not positive.
    """
    if not contributions or len(contributions) != len(weights) or min(weights) < 1:
        raise SwarmError("an average needs contributions, each with a positive weight")
    if any(vector.shape != contributions[0].shape for vector in contributions):
        raise SwarmError("an average needs contributions of one length")
    total = sum(weights)
    mean = np.zeros(contributions[0].shape, np.float32)
    scratch = np.empty(min(TILE_VALUES, len(mean)), np.float32)
    # Near the largest float32 a sum may overflow: the encoder refuses the result, as it does any infinity.
    with np.errstate(over="ignore"):
        for first in range(0, len(mean), TILE_VALUES):
            span = slice(first, first + TILE_VALUES)
            tile = scratch[: len(mean[span])]
            for vector, weight in zip(contributions, weights, strict=True):
                np.multiply(vector[span], np.float32(weight / total), out=tile)
                np.add(mean[span], tile, out=mean[span])
    return mean


def check_subnormals() -> None:
    """Raise `SwarmError` where this thread flushes subnormal numbers to zero (some libraries switch that on)."""
    smallest = np.full(8, np.finfo(np.float32).tiny, np.float32)
    halves = np.multiply(smallest, np.float32(0.5))
    kept = np.multiply(halves, np.float32(2.0))
    if not np.array_equal(kept, smallest):
        raise SwarmError(
            "this process flushes subnormal numbers to zero, so its state would differ from everybody's",
            "start it without libraries that were built with -ffast-math",
        )


def _step_tile(
    anchor: Float32, momentum: Float32, gradient: Float32, factors: tuple[np.float32, np.float32], scratch: Float32
) -> None:
    lr, mu = factors
    clipped, update = scratch[0, : len(anchor)], scratch[1, : len(anchor)]
    np.clip(gradient, -LARGEST_MOVEMENT, LARGEST_MOVEMENT, out=clipped)
    np.multiply(momentum, mu, out=momentum)
    np.add(momentum, clipped, out=momentum)
    np.multiply(momentum, mu, out=update)
    np.add(update, clipped, out=update)
    np.multiply(update, lr, out=update)
    np.subtract(anchor, update, out=anchor)
