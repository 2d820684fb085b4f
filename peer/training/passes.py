"""Passes: a microbatch through one span in two halves, forward and then backward once its gradient is there.

Decides what a half computes and keeps, alike for replicas in 8 bits and in fp32, so that nothing is held between the
halves but the microbatch's own activations: others may pass meanwhile. Leaves weights, their gradients and when they
change to the replicas, and where hidden states come from and go to `peer.pipeline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from peer.rounds.codec import Float32
from peer.training.microbatches import Microbatch, Tokens, Trained, check_batch
from swarm.errors import DataError, SwarmError

Loss = Callable[[torch.Tensor, torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor | None]]
"""(hidden [N, I], targets [N], weight) -> (sum of cross entropies, gradient of weight * sum for hidden); the head's own
gradients are taken in. Where the sum is not finite and none of them was, there is no gradient for hidden either.
Without a weight there are no gradients at all."""


Later = Sequence[tuple[slice, int]]
"""(values of the span from some shard on, microbatches that entered at that shard)"""


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Passed:
    """A microbatch that went forward through a span: what its way back needs."""

    batch_BL: torch.Tensor
    """token ids [B, L+1]"""
    entered: torch.Tensor
    """tokens [B, L], or the hidden states that came in, which collect their gradient"""
    hidden_BLH: torch.Tensor
    """what the span made of them, with its graph"""
    weight: float
    again: Microbatch | None = None
    """nothing of it was kept: it goes forward once more on its way back"""

    @property
    def result_BLH(self) -> torch.Tensor:
        """For the span after."""
        return self.hidden_BLH.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A microbatch that went through a span without a trace."""

    hidden_BLH: torch.Tensor
    """for the span after"""
    loss: float
    """sum over the tokens in nats, in the span that has the head; elsewhere 0"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """How an inner step ended. Where ``ok`` is false some gradient was not finite, and what it belongs to stayed."""

    grad_norm: float
    ok: bool


class SpanReplica(Protocol):
    """What the pipeline needs of a replica; one thread owns it."""

    def begin_step(self, learning_rate: float, num_microbatches: int | None = None) -> object:
        """Gather gradients from now on. None: nobody knows yet of how many microbatches."""
        ...

    def forward(self, given: Microbatch) -> Passed:
        """Raises `DataError` for tokens or hidden states of a wrong shape, or tokens outside the vocabulary."""
        ...

    def backward(self, passed: Passed, gradient_BLH: torch.Tensor | None, *, counts: bool = True) -> Trained:
        """``gradient_BLH``: from the span after; ignored in the span that has the head. Once for each ``passed``.

        Where ``counts`` is false the answer is the same, and nothing of it is learned.
        """
        ...

    def finish_step(self, num_microbatches: int, later: Later = ()) -> StepOutcome:
        """Learn from the mean of the ``num_microbatches`` that counted since the step began.

        ``later``: of which values it is so many more, as these entered within the span.
        """
        ...

    def drop_step(self) -> None:
        """Forget what was gathered."""
        ...

    def measure(self, given: Microbatch, anchors: Sequence[Float32], values: slice | None = None) -> Measured:
        """Through the exact ``anchors`` of the span's shards instead of its own weights; nothing changes.

        ``values``: of which shards, where ``given`` enters within the span; None: all. Raises as `forward`, and
        `ResourceError` where memory runs out.
        """
        ...


class Passes:
    """The model of one span, and how it is gone through."""

    def __init__(self, model: torch.nn.Module, device: torch.device, compute: torch.dtype, loss: Loss | None) -> None:
        """``loss``: None for a span without the head."""
        ends: Any = model
        self._model, self._device, self._compute, self.loss = ends, device, compute, loss
        self.has_embedding = not isinstance(ends.get_input_embeddings(), torch.nn.Identity)
        self.vocab_size: int = ends.config.vocab_size
        self._entrances: dict[int, Any] = {}

    def open_entrance(self, shard: int, later: torch.nn.Module) -> None:
        """Microbatches may enter at ``shard`` too; ``later``: the model from there on, over the same memory."""
        self._entrances[shard] = later

    def forward(self, given: Microbatch) -> Passed:
        batch_BL = self.batch(given.tokens)
        later = None if given.entrance is None else self._entrances[given.entrance]
        begins = self.has_embedding and later is None
        entered = batch_BL[:, :-1] if begins else self._entered(given, batch_BL)
        hidden_BLH = self.hidden(entered) if later is None else self._through(later, {"inputs_embeds": entered})
        return Passed(batch_BL=batch_BL, entered=entered, hidden_BLH=hidden_BLH, weight=given.weight)

    def backward(self, passed: Passed, gradient_BLH: torch.Tensor | None) -> Trained:
        """All gradients of the span are taken in, unless the loss is not finite: then none is, or it is spoiled."""
        hidden_BLH, loss = passed.hidden_BLH, 0.0
        if self.loss is not None:
            targets_N = passed.batch_BL[:, 1:].flatten()
            total, gradient_BLH = self.loss(passed.result_BLH.flatten(0, 1), targets_N, passed.weight)
            loss = total.item() if math.isfinite(total.item() * passed.weight) else math.nan
        if gradient_BLH is None or math.isnan(loss):
            return Trained(loss=math.nan, gradient_BLH=None, is_spoiled=gradient_BLH is not None)
        if gradient_BLH.numel() != hidden_BLH.numel():
            raise DataError(f"a gradient of {gradient_BLH.numel()} values for hidden states of {hidden_BLH.numel()}")
        gradient_BLH = gradient_BLH.to(hidden_BLH.device, hidden_BLH.dtype).view(hidden_BLH.shape)
        hidden_BLH.backward(gradient_BLH)  # type: ignore[no-untyped-call]
        return Trained(loss=loss, gradient_BLH=passed.entered.grad if passed.entered.requires_grad else None)

    def measure(self, given: Microbatch) -> Measured:
        """There, without a way back."""
        with torch.no_grad():
            passed = self.forward(given)
            loss = 0.0
            if self.loss is not None:
                targets_N = passed.batch_BL[:, 1:].flatten()
                loss = self.loss(passed.result_BLH.flatten(0, 1), targets_N, None)[0].item()
        return Measured(hidden_BLH=passed.result_BLH, loss=loss)

    def train(self, given: Microbatch, backward: Callable[[Passed, torch.Tensor | None], Trained]) -> Trained:
        """There, on through the spans after, and back, all at once."""
        passed = self.forward(given)
        if self.loss is not None:
            return backward(passed, None)
        if given.onward is None:
            raise SwarmError("a span without the head needs the spans after it")
        return backward(passed, given.onward(passed.result_BLH))

    def hidden(self, entered: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L], or hidden states of the span before, through this span: [B, L, H]."""
        return self._through(self._model, {"input_ids" if self.has_embedding else "inputs_embeds": entered})

    def _through(self, model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.precision():
            hidden_BLH: torch.Tensor = model.base_model(**given, use_cache=False).last_hidden_state
        return hidden_BLH

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._compute == torch.bfloat16)

    def batch(self, tokens: Tokens) -> torch.Tensor:
        check_batch(tokens, self.vocab_size)
        return torch.from_numpy(np.array(tokens)).to(self._device)

    def _entered(self, given: Microbatch, batch_BL: torch.Tensor) -> torch.Tensor:
        hidden, wanted = given.hidden_BLH, (len(batch_BL), batch_BL.shape[1] - 1)
        if hidden is None or hidden.ndim != 3 or tuple(hidden.shape[:2]) != wanted or not hidden.is_floating_point():
            raise DataError(f"hidden states of {wanted[0]} sequences of {wanted[1]} tokens are wanted")
        return hidden.detach().to(self._device).requires_grad_()
