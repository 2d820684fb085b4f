"""The outer optimizer: how a committed average moves the anchor, bit for bit the same on every machine.

Decides the arithmetic: Nesterov momentum on pseudo-gradients (arXiv 2311.08105), in elementwise fp32, every
multiplication and addition rounded on its own. numpy runs one operation per call, so no compiler can fuse a
multiplication with an addition, and float32 scalars keep everything in float32. Momentum lies in 8 bits between two
rounds (`peer.rounds.blocks` has its rounding): it is read, the step is made with it in fp32, and the new momentum is
written; no more than a tile of it is ever in fp32. Leaves schedules to `swarm.schedule`, slices and digests to
`peer.rounds.shard`.

Two rules make the state the same everywhere and keep it finite:
- subnormal numbers are kept, as IEEE 754 has them: a thread whose processor flushes them is refused;
- an average is clipped to +-2**30, far above any movement that training makes, so the state can never reach an
  infinity or a NaN (whose bits differ between processors).

A part that was committed as *absent* is not applied at all: its slices of anchor and momentum stay as they are.
With a momentum factor of 0 the momentum becomes the pseudo-gradient and the step is plain averaging scaled by ``lr``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peer.rounds.blocks import TILE_VALUES, Blocks, tiles
from peer.rounds.codec import Float32
from swarm.errors import SwarmError

LARGEST_MOVEMENT = np.float32(2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterStep:
    """``round``: the round that is applied; both factors are rounded to float32 before they are used."""

    learning_rate: float
    momentum_factor: float
    round: int


def outer_step(anchor: Float32, momentum: Blocks, first: int, pseudo_gradient: Float32, step: OuterStep) -> None:
    """Move ``anchor`` and ``momentum``, both a whole shard's, in place by one average of the values from ``first`` on.

    ``momentum = mu * momentum + g`` and then ``anchor -= lr * (g + mu * momentum)``; the new momentum is quantised
    after the anchor has moved. Raises `SwarmError` for vectors that do not fit each other, values that are not whole
    blocks, or a thread that flushes subnormals.
    """
    check_subnormals()
    last = first + len(pseudo_gradient)
    vectors_fit = all(vector.dtype == np.float32 and vector.ndim == 1 for vector in (anchor, pseudo_gradient))
    if not vectors_fit or len(anchor) != momentum.num_values or not 0 <= first <= last <= len(anchor):
        raise SwarmError("the outer step takes a float32 anchor, as much momentum, and a float32 average within them")
    factors = np.float32(step.learning_rate), np.float32(step.momentum_factor)
    scratch = np.empty((3, min(TILE_VALUES, len(pseudo_gradient))), np.float32)
    for values in tiles(slice(first, last)):
        old, clipped, update = scratch[:, : values.stop - values.start]
        momentum.read_tile(values, old)
        gradient = pseudo_gradient[values.start - first : values.stop - first]
        np.clip(gradient, -LARGEST_MOVEMENT, LARGEST_MOVEMENT, out=clipped)
        _step_tile(anchor[values], old, clipped, factors, update)
        momentum.write_tile(values, old, step.round, update)


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
    anchor: Float32, momentum: Float32, clipped: Float32, factors: tuple[np.float32, np.float32], update: Float32
) -> None:
    lr, mu = factors
    np.multiply(momentum, mu, out=momentum)
    np.add(momentum, clipped, out=momentum)
    np.multiply(momentum, mu, out=update)
    np.add(update, clipped, out=update)
    np.multiply(update, lr, out=update)
    np.subtract(anchor, update, out=anchor)
