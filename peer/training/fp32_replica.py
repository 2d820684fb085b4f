"""The fp32 replica: a peer's own working copy of the weights, which moves away from the anchor step by step.

The reference that `peer.training.int8_replica` is measured against, and what runs where a spec asks for it. Decides how
one inner step is made (loss, clipping, when a step is skipped, what happens when memory runs out) and how weights go in
and out as flat fp32 vectors on the host. Leaves the optimizer to `peer.training.inner_optimizer`, when steps are made
to `peer.training.trainer`, and what vectors mean (anchor, movement) to the round. Not thread-safe: the trainer owns it.

Shapes: B sequences of L tokens (each row holds one token more, the last target), V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from peer.rounds.codec import Float32
from peer.training.device import computes_in_bf16
from peer.training.exact_anchor import holding, mean_loss
from peer.training.inner_optimizer import build_optimizer
from peer.training.layout import Layout, Piece, slices_of
from peer.training.microbatches import Microbatch, Microbatches, StepResult, Tokens, Trained, check_batch
from peer.training.movement import Movement
from peer.training.passes import Later, Measured, Passed, Passes, StepOutcome
from peer.training.pieces import Pieces
from peer.training.span import materialise
from swarm.errors import ResourceError, SwarmError
from swarm.run_spec import Inner


def views_of(layout: Layout, flat: Float32) -> list[torch.Tensor]:
    """Every parameter within ``flat``, in order, as host tensors that share its memory (writable or copied)."""
    if flat.dtype != np.float32:
        raise SwarmError(f"weights are float32, not {flat.dtype}")
    writable = flat if flat.flags.writeable else flat.copy()
    return [torch.from_numpy(view) for view in layout.views(writable).values()]


def views_of_shards(piece: Piece, anchors: Sequence[Float32]) -> list[torch.Tensor]:
    """Every parameter of ``piece`` within the ``anchors`` of the shards that it is made of; see `views_of`."""
    parts = slices_of([len(anchor) for anchor in anchors])
    return [
        view
        for values, anchor in zip(parts, anchors, strict=True)
        for view in views_of(piece.layout.piece(values).layout, anchor)
    ]


class Replica:
    def __init__(
        self,
        model: torch.nn.Module,
        layout: Layout,
        inner: Inner,
        device: torch.device,
        microbatch_sequences: int | None = None,
    ) -> None:
        """``layout`` is the model's own, see `peer.training.model.layout_of`. The model moves to ``device``.

        Its parameters may be on the meta device: then load an anchor. ``microbatch_sequences``: how many at once, at
        most.
        """
        self._layout, self._inner, self._device = layout, inner, device
        try:
            if any(parameter.is_meta for parameter in model.parameters()):
                empty = ((name, torch.zeros(p.shape, device=device)) for name, p in list(model.named_parameters()))
                materialise(model, empty, device)
            self._model = model.to(device).train()
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"the model does not fit into the memory of {device}", "use --device cpu") from error
        named = dict(self._model.named_parameters())
        if [(name, tuple(p.shape)) for name, p in named.items()] != [(e.name, e.shape) for e in layout.entries]:
            raise SwarmError("the layout is not that of the model")
        self._parameters = [named[entry.name] for entry in layout.entries]
        ends: Any = self._model
        self._head = ends.get_output_embeddings()
        compute = torch.bfloat16 if computes_in_bf16(device) else torch.float32
        has_head = not isinstance(self._head, torch.nn.Identity)
        self.passes = Passes(self._model, device, compute, self._head_loss if has_head else None)
        self._learning_rate = 0.0
        self._optimizer = build_optimizer(self._parameters, inner, device)
        self._microbatches = Microbatches(microbatch_sequences, device)
        self._pieces = Pieces(self.passes, self._microbatches)
        self._anchor = self.read()

    def load(self, anchor: Float32, values: slice | None = None) -> None:
        """Put the weights of ``anchor`` in; the optimizer's moments stay.

        ``values``: which of the layout's ``anchor`` has (None: all); whole parameters. Raises `SwarmError` for a wrong
        length.
        """
        piece = self._layout.piece(values)
        views = views_of(piece.layout, anchor)
        with torch.no_grad():
            for parameter, view in zip(piece.of(self._parameters), views, strict=True):
                parameter.copy_(view)
        self._anchor[piece.values] = anchor

    def reset(self, anchor: Float32, values: slice | None = None) -> None:
        """Start again from ``anchor`` with fresh moments: the way out of repeated bad steps."""
        self.load(anchor, values)
        for parameter in self._layout.piece(values).of(self._parameters):
            self._optimizer.state.pop(parameter, None)

    def read(self, values: slice | None = None) -> Float32:
        """The weights now, as a fresh flat vector on the host."""
        piece = self._layout.piece(values)
        flat = np.empty(piece.layout.num_values, np.float32)
        with torch.no_grad():
            for parameter, view in zip(piece.of(self._parameters), views_of(piece.layout, flat), strict=True):
                view.copy_(parameter)
        return flat

    def movement(self, values: slice | None = None) -> Float32:
        """What was learned since the anchor, as a fresh flat vector on the host."""
        moved = self.read(values)
        moved -= self._anchor[values or slice(None)]
        return moved

    def land(self, new_anchor: Float32, snapshot: Movement, values: slice | None = None) -> None:
        """Weights = ``new_anchor`` + (movement now - ``snapshot``): what was learned since the snapshot stays."""
        views_of(self._layout.piece(values).layout, new_anchor)  # a wrong length is refused before anything changes
        if len(snapshot) != len(new_anchor):
            raise SwarmError("a snapshot of another length than the anchor")
        weights = self.movement(values)
        weights -= snapshot[:]
        weights += new_anchor
        self.load(weights, values)
        self._anchor[values or slice(None)] = new_anchor

    def step(self, tokens: Tokens, learning_rate: float) -> StepResult:
        """One inner step on ``tokens`` [B, L+1].

        Raises `DataError` for tokens of a wrong shape or outside the vocabulary, and `ResourceError` where even one
        sequence at a time does not fit into memory.
        """
        check_batch(tokens, self.passes.vocab_size)
        loss = self._gradients(tokens)
        grad_norm = self._learn(learning_rate, ok=math.isfinite(loss))
        ok = math.isfinite(loss) and math.isfinite(grad_norm)
        return StepResult(loss=loss, grad_norm=grad_norm, ok=ok, num_microbatches=self._microbatches.number(tokens))

    def begin_step(self, learning_rate: float, num_microbatches: int | None = None) -> None:
        """See `peer.training.passes.SpanReplica`."""
        self.drop_step()
        self._learning_rate = learning_rate

    def forward(self, given: Microbatch) -> Passed:
        """See `peer.training.passes.SpanReplica`."""
        return self._pieces.forward(given)

    def backward(self, passed: Passed, gradient_BLH: torch.Tensor | None, *, counts: bool = True) -> Trained:
        """See `peer.training.passes.SpanReplica`."""
        if counts:
            return self._pieces.backward(passed, gradient_BLH)
        gathered = [parameter.grad for parameter in self._parameters]
        try:
            self.drop_step()
            return self._pieces.backward(passed, gradient_BLH)
        finally:
            for parameter, gradient in zip(self._parameters, gathered, strict=True):
                parameter.grad = gradient

    def finish_step(self, num_microbatches: int, later: Later = ()) -> StepOutcome:
        """See `peer.training.passes.SpanReplica`."""
        numbers = self._layout.numbers(num_microbatches, later)
        if max(numbers) < 1:
            raise SwarmError("an inner step that nothing counted towards")
        for parameter, number in zip(self._parameters, numbers, strict=True):
            if parameter.grad is not None:
                parameter.grad.div_(number)
        grad_norm = self._learn(self._learning_rate, ok=True)
        return StepOutcome(grad_norm=grad_norm, ok=math.isfinite(grad_norm))

    def drop_step(self) -> None:
        """See `peer.training.passes.SpanReplica`."""
        self._optimizer.zero_grad(set_to_none=True)

    def _learn(self, learning_rate: float, *, ok: bool) -> float:
        """From the gradients that are there, unless they are not finite; gives their norm before clipping."""
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._inner.clip_norm))
        if ok and math.isfinite(grad_norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def evaluate(self, anchor: Float32, batches: Iterable[Tokens]) -> float:
        """Mean loss of ``anchor`` in nats per token; weights and optimizer stay exactly as they are.

        Nobody may change ``anchor`` meanwhile: on the CPU it is used in place. Raises `DataError` where there are no
        batches, and `ResourceError` where the memory has no room for a second set of weights.
        """
        pieces = (piece for tokens in batches for piece in self._microbatches.of(tokens))
        with holding(self._model, self._parameters, views_of(self._layout, anchor)):
            return mean_loss(self.passes, pieces)

    def measure(self, given: Microbatch, anchors: Sequence[Float32], values: slice | None = None) -> Measured:
        """See `peer.training.passes.SpanReplica`."""
        piece = self._layout.piece(values)
        with holding(self._model, piece.of(self._parameters), views_of_shards(piece, anchors)):
            return self._pieces.measure(given)

    def _gradients(self, tokens: Tokens) -> float:
        """Accumulate the gradient of the mean loss; whenever memory runs out, again in halves, and so from then."""
        while True:
            try:
                return self._accumulate(tokens)
            except torch.OutOfMemoryError as error:
                self._microbatches.must_shrink(len(tokens), error)
            # Outside the handler, where the exception no longer keeps the failed step's tensors alive.
            self._microbatches.halve(len(tokens))

    def _accumulate(self, tokens: Tokens) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for piece in self._microbatches.of(tokens):
            loss = self._loss(self.passes.batch(piece)) * (len(piece) / len(tokens))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def _loss(self, batch_BL: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the next token, in nats."""
        with self.passes.precision():
            logits_BLV = self._model(input_ids=batch_BL[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), batch_BL[:, 1:].flatten())

    def _head_loss(
        self, hidden_NI: torch.Tensor, targets_N: torch.Tensor, weight: float | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `peer.training.passes.Loss`."""
        entered_NI = hidden_NI.requires_grad_(weight is not None)
        with self.passes.precision():
            logits_NV = self._head(entered_NI)
        total = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        if weight is None or not math.isfinite(total.item() * weight):
            return total.detach(), None
        (total * weight).backward()  # type: ignore[no-untyped-call]
        return total.detach(), entered_NI.grad
