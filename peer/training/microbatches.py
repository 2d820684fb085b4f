"""Microbatches: what goes through a model, or through one span of it, at once.

Decides which batches are refused, into how many sequences at once a batch is cut, and what happens to that number when
memory runs out. Leaves passing them to `peer.training.int8_replica` and `peer.training.fp32_replica`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from swarm.errors import DataError, ResourceError

Tokens = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One inner step. Where ``ok`` is false, loss or gradient were not finite and the weights did not change."""

    loss: float  # nats per token
    grad_norm: float  # before clipping
    ok: bool
    num_microbatches: int = 1
    """more than one: their gradients were added up"""


def check_batch(tokens: Tokens, vocab_size: int) -> None:
    """Raises `DataError` unless ``tokens`` is int64 [B, L+1] and within the vocabulary."""
    if tokens.ndim != 2 or tokens.dtype != np.int64 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(f"a batch is int64 of shape [B, L+1], not {tokens.dtype} of shape {tokens.shape}")
    # On CUDA a token outside the embedding would end the process, not raise.
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(f"a batch holds a token outside the vocabulary of {vocab_size}")


class Microbatches:
    """How many sequences go through a model at once: as many as the memory plan says, fewer where memory runs out."""

    def __init__(self, sequences: int | None, device: torch.device) -> None:
        """``sequences``: at most so many; None: all of a batch."""
        self._sequences, self._device = sequences, device

    def of(self, tokens: Tokens) -> Iterator[Tokens]:
        size = self._size(len(tokens))
        for first in range(0, len(tokens), size):
            yield tokens[first : first + size]

    def number(self, tokens: Tokens) -> int:
        return -(-len(tokens) // self._size(len(tokens)))

    def must_shrink(self, batch: int, error: torch.OutOfMemoryError) -> None:
        """Memory ran out; raises `ResourceError` where one sequence at a time was too much."""
        if self._size(batch) == 1:
            raise ResourceError(
                f"one sequence at a time does not fit into the memory of {self._device}",
                "close other programs that use the device, or use --device cpu",
            ) from error

    def halve(self, batch: int) -> None:
        self._sequences = -(-self._size(batch) // 2)
        logger.warning("memory ran out: from now on %d of %d sequences at once", self._sequences, batch)

    def _size(self, batch: int) -> int:
        return min(batch, self._sequences or batch)


Onward = Callable[[torch.Tensor], torch.Tensor | None]
"""The spans after: hidden states [B, L, H] -> their gradient, or None where the loss was not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """What one span is given of a microbatch: B sequences of L tokens, H values for each."""

    tokens: Tokens
    """[B, L+1]"""
    weight: float
    """of every token's loss in the loss of the inner step"""
    hidden_BLH: torch.Tensor | None = None
    """what the span before gave; None for the span that has the embedding"""
    entrance: int | None = None
    """the shard within the span whose first layer it enters; None: the span's own first"""
    onward: Onward | None = None
    """None for the span that has the head"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of a microbatch in one span. Where the loss was not finite it is NaN, and nothing was learned."""

    loss: float
    """sum over the tokens in nats, in the span that has the head; elsewhere 0"""
    gradient_BLH: torch.Tensor | None
    """of ``hidden_BLH``"""
    is_spoiled: bool = False
    """some of its gradients were taken in before the loss turned out not to be finite: drop the inner step"""
