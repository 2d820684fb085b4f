"""A microbatch through a span in pieces, where memory does not hold it at once.

Decides what a replica among others does when memory runs out: from then on nothing stays of a microbatch on its way
there but what came in, and on its way back it goes forward again, a piece at a time, whose gradients add up to the
whole's. What was under way is asked for again. Leaves how large a piece is to `peer.training.microbatches`, a piece to
`peer.training.passes`, and weights to the replicas. (A whole model alone halves its batches by itself.)
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import torch

from peer.training.microbatches import Microbatch, Microbatches, Trained
from peer.training.passes import Measured, Passed, Passes
from swarm.errors import Busy


class Pieces:
    def __init__(self, passes: Passes, at_once: Microbatches) -> None:
        self._passes, self._at_once = passes, at_once
        self._forgets = False
        self._kept: weakref.WeakSet[Passed] = weakref.WeakSet()
        """microbatches under way whose activations are in memory"""

    def forward(self, given: Microbatch) -> Passed:
        """See `peer.training.passes.SpanReplica`; where memory runs out, again in pieces, and so from then.

        Raises `Busy` where it ran out beside others that are under way, and `ResourceError` where even one sequence at
        a time does not fit.
        """
        while True:
            try:
                return self._forward(given)
            except torch.OutOfMemoryError as error:
                self._make_room(len(given.tokens), error)
            if self._kept:
                raise Busy("busy: memory ran out beside others that are under way")

    def backward(self, passed: Passed, gradient_BLH: torch.Tensor | None) -> Trained:
        """See `peer.training.passes.Passes`. Raises `Busy` where memory ran out: it may be asked for again."""
        self._kept.discard(passed)
        try:
            if passed.again is None:
                return self._passes.backward(passed, gradient_BLH)
            return self._back_in_pieces(passed.again, gradient_BLH)
        except torch.OutOfMemoryError as error:
            self._make_room(len(passed.batch_BL), error)
        raise Busy("busy: memory ran out; from now on microbatches go in smaller pieces")

    def measure(self, given: Microbatch) -> Measured:
        """See `peer.training.passes.Passes`."""
        measured, first = list[Measured](), 0
        while first < len(given.tokens):
            piece = self._piece(given, first)
            measured.append(self._passes.measure(piece))
            first += len(piece.tokens)
        hidden_BLH = torch.cat([piece.hidden_BLH for piece in measured])
        return Measured(hidden_BLH=hidden_BLH, loss=math.fsum(piece.loss for piece in measured))

    def _forward(self, given: Microbatch) -> Passed:
        if not self._forgets and self._at_once.number(given.tokens) == 1:
            passed = self._passes.forward(given)
            self._kept.add(passed)
            return passed
        batch_BL = self._passes.batch(given.tokens)
        # The head is at the end of the way: nothing goes on from there.
        hidden_BLH = batch_BL if self._passes.loss is not None else self.measure(given).hidden_BLH
        return Passed(batch_BL=batch_BL, entered=batch_BL, hidden_BLH=hidden_BLH, weight=given.weight, again=given)

    def _back_in_pieces(self, given: Microbatch, gradient_BLH: torch.Tensor | None) -> Trained:
        loss, gradients, first = 0.0, list[torch.Tensor](), 0
        while first < len(given.tokens):
            piece = self._piece(given, first)
            passed = self._forward_again(piece)
            if passed is None:
                continue
            last = first + len(piece.tokens)
            trained = self._passes.backward(passed, None if gradient_BLH is None else gradient_BLH[first:last])
            if math.isnan(trained.loss):
                return replace(trained, is_spoiled=trained.is_spoiled or first > 0)
            loss, first = loss + trained.loss, last
            if trained.gradient_BLH is not None:
                gradients.append(trained.gradient_BLH)
        return Trained(loss=loss, gradient_BLH=torch.cat(gradients) if gradients else None)

    def _forward_again(self, piece: Microbatch) -> Passed | None:
        """None where that was too large: nothing of it was taken in, and the next one is smaller."""
        try:
            return self._passes.forward(piece)
        except torch.OutOfMemoryError as error:
            self._make_room(len(piece.tokens), error)
        return None

    def _make_room(self, num_sequences: int, error: torch.OutOfMemoryError) -> None:
        """Keep nothing from now on; and where nothing was kept beside it, go in smaller pieces."""
        self._forgets = True
        if not self._kept:
            self._at_once.must_shrink(num_sequences, error)
            self._at_once.halve(num_sequences)

    def _piece(self, given: Microbatch, first: int) -> Microbatch:
        """As many of its sequences from ``first`` on as go through at once."""
        tokens = next(self._at_once.of(given.tokens[first:]))
        hidden_BLH = None if given.hidden_BLH is None else given.hidden_BLH[first : first + len(tokens)]
        return replace(given, tokens=tokens, hidden_BLH=hidden_BLH)
