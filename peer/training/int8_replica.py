"""The 8-bit replica: weights in int8, moments in 8 bits, each matrix updated within the backward pass.

Decides how a model of `transformers`, whole or of a span, becomes one whose matrices exist only in 8 bits, how one
inner step is made from there (loss, what is skipped, what happens when memory runs out), and what its movement is.
Leaves a matrix's update to `peer.training.int8_matrix`, gradients to `peer.training.int8_modules`, when steps are made
to `peer.training.trainer`. Not thread-safe: the trainer owns it.

With one microbatch a step never holds two matrices' gradients (a tied matrix keeps its own in bf16 until the last part
is there). With several (memory is scarce) gradients add up in bf16, and `StepResult.num_microbatches` says so.
Norms and biases stay in fp32 with fp32 AdamW, clipped together as one more tensor.

A span that is not the whole model learns by the same path, a microbatch at a time: `train_microbatch` takes what the
span before gave, hands its own result to the span after, and gives back the gradient (design 5.3).

Everything random comes from one seeded generator: the same seed, steps and landings give the same replica on the same
machine. (Where attention's own backward pass is not deterministic, as on some GPUs, steps are not either.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peer.rounds.codec import Float32
from peer.training.clipping import first_shares, next_shares
from peer.training.device import computes_in_bf16
from peer.training.dither import Dither, random_noise
from peer.training.exact_anchor import holding, mean_loss
from peer.training.fp32_replica import views_of, views_of_shards
from peer.training.inner_optimizer import build_optimizer
from peer.training.int8_matrix import InnerStep, Int8Matrix
from peer.training.int8_model import materialise_vectors, replace_matrices
from peer.training.int8_modules import Int8Linear, cross_entropy
from peer.training.layout import Layout, Piece
from peer.training.microbatches import Microbatch, Microbatches, StepResult, Tokens, Trained, check_batch
from peer.training.movement import BLOCK_VALUES, Movement, PackedEntry, PackedWeights, ReplicaMovement
from peer.training.passes import Later, Measured, Passed, Passes, StepOutcome
from peer.training.pieces import Pieces
from peer.training.quantized import num_blocks, packed
from swarm.errors import ResourceError, SwarmError
from swarm.run_spec import Inner

# Values that are on their way between anchor and replica at once, in several fp32 vectors.
LANDING_VALUES = 1 << 17
# Of an inner step that nobody knows the end of: more than any has.
MORE_MICROBATCHES = 1 << 30


class Int8Replica:
    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        inner: Inner,
        device: torch.device,
        seed: int = 0,
        microbatch_sequences: int | None = None,
    ) -> None:
        """``layout`` is the model's own, see `peer.training.model.layout_of`; ``model`` gives up its matrices.

        The parameters of ``model`` may be on the meta device, so that fp32 weights never exist: then load an anchor.
        ``microbatch_sequences``: how many at once, at most. Raises `SwarmError` for a layout of another model, or a
        model with matrices outside of linear and embedding layers.
        """
        self._layout, self._inner, self._device = layout, inner, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._dither = Dither(self._generator)
        self._compute = torch.bfloat16 if computes_in_bf16(device) else torch.float32
        if [(n, tuple(p.shape)) for n, p in model.named_parameters()] != [(e.name, e.shape) for e in layout.entries]:
            raise SwarmError("the layout is not that of the model")
        initial = [parameter.detach() for parameter in model.parameters()]
        is_empty = any(value.is_meta for value in initial)
        try:
            self._members = replace_matrices(model, layout, inner, device, self._compute)
            if is_empty:
                self._members = materialise_vectors(model, self._members, device)
            self._model = model.to(device).train()
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"the model does not fit into the memory of {device}", "use --device cpu") from error
        if inner.checkpoint_activations:
            # The second name is what older versions of transformers 5 call it.
            old: Any = self._model.gradient_checkpointing_enable
            getattr(self._model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        self._matrices = [member for member in self._members if isinstance(member, Int8Matrix)]
        self._vectors = [member for member in self._members if not isinstance(member, Int8Matrix)]
        self._usual_shares = first_shares(len(self._matrices) + 1)  # the vectors are one more tensor
        ends: Any = self._model
        head = ends.get_output_embeddings()
        self._head: Int8Linear | None = head if isinstance(head, Int8Linear) else None
        self.passes = Passes(self._model, device, self._compute, self._loss if self._head is not None else None)
        self._inner_step: InnerStep | None = None
        self._microbatches = Microbatches(microbatch_sequences, device)
        self._pieces = Pieces(self.passes, self._microbatches)
        optimised = self._vectors or [nn.Parameter(torch.zeros(1, device=device))]
        self._optimizer = build_optimizer(optimised, inner.model_copy(update={"optimizer": "adamw"}), device)
        self._carried: PackedWeights | None = None
        whole = layout.piece(None)
        if not is_empty:
            self._put(initial, whole)
        self._start = self._pack(whole)

    # ---- weights in and out -------------------------------------------------------------------------------------

    def load(self, anchor: Float32, values: slice | None = None) -> None:
        """Put the weights of ``anchor`` in, in 8 bits; moments stay. Raises `SwarmError` for a wrong length.

        ``values``, here and below: which of the layout's it has (None: all); whole parameters.
        """
        piece = self._layout.piece(values)
        self._put(views_of(piece.layout, anchor), piece)
        self._begin_from_here(piece)

    def reset(self, anchor: Float32, values: slice | None = None) -> None:
        """Start again from ``anchor`` with fresh moments: the way out of repeated bad steps."""
        self.load(anchor, values)
        for member in self._layout.piece(values).of(self._members):
            if isinstance(member, Int8Matrix):
                member.moments.forget()
            else:
                self._optimizer.state.pop(member, None)
        self._usual_shares = first_shares(len(self._matrices) + 1)

    def read(self) -> Float32:
        """The dequantised weights now, as a fresh flat vector on the host."""
        return self._pack(self._layout.piece(None))[:]

    def movement(self, values: slice | None = None) -> Movement:
        """What was learned since the anchor, 1 byte a value; it stays as it is until these ``values`` land."""
        piece = self._layout.piece(values)
        carried = None if self._carried is None else self._carried.piece(piece)
        return ReplicaMovement(now=self._pack(piece), start=self._start.piece(piece), carried=carried)

    def land(self, new_anchor: Float32, snapshot: Movement, values: slice | None = None) -> None:
        """Weights = quantised (``new_anchor`` + what was learned since ``snapshot``), which is carried into the next.

        What is carried is itself rounded to 8 bits first, stochastically, and then used for both: so what the replica
        does from here and what its movement says agree to the bit. Tile by tile, where start and carried movement
        lie already: ``snapshot`` shares them, and is of no use afterwards.
        """
        piece = self._layout.piece(values)
        if len(new_anchor) != len(snapshot) or len(new_anchor) != piece.layout.num_values:
            raise SwarmError("an anchor or a snapshot of another length than the layout")
        seed = torch.randint(2**62, (), generator=self._generator, device=self._device)
        host = torch.Generator().manual_seed(int(seed))
        carried = self._carried or self._start.zeros()
        anchors = views_of(piece.layout, new_anchor)
        for index, entry, anchor in zip(piece.indices, piece.layout.entries, anchors, strict=True):
            member, columns = self._members[index], anchor[0].numel()
            for first, last in _row_tiles(member):
                span = slice(first * columns, last * columns)
                flat = slice(entry.offset + span.start, entry.offset + span.stop)
                learned = self._moved(index, span)
                learned -= snapshot[flat]
                kept = packed(learned, host if isinstance(member, Int8Matrix) else None)
                moved = torch.from_numpy(kept.values(0, len(kept.codes)))
                self._write(member, first, moved.add_(anchor.view(-1)[span]))
                carried.entries[index].write(span.start, kept)
                self._start.entries[index].write(span.start, self._piece(member, span))
        self._carried = carried

    def _moved(self, index: int, span: slice) -> Float32:
        """The movement of a piece of one parameter."""
        piece = self._piece(self._members[index], span)
        moved = piece.values(0, len(piece.codes))
        moved -= self._start.entries[index].values(span.start, span.stop)
        if self._carried is not None:
            moved += self._carried.entries[index].values(span.start, span.stop)
        return moved

    def _piece(self, member: Int8Matrix | nn.Parameter, span: slice) -> PackedEntry:
        """A copy on the host of values of ``member``; ``span`` begins with a block."""
        if isinstance(member, Int8Matrix):
            blocks = slice(span.start // BLOCK_VALUES, num_blocks(span.stop))
            kept = [tensor.to("cpu", copy=True).numpy() for tensor in (member.codes[span], member.scales[blocks])]
            return PackedEntry(kept[0], kept[1])
        return PackedEntry(member.detach().reshape(-1)[span].to("cpu", copy=True).numpy(), None)

    def _put(self, values: list[torch.Tensor], piece: Piece) -> None:
        for member, value in zip(piece.of(self._members), values, strict=True):
            flat = value.reshape(member.shape[0], -1)
            for first, last in _row_tiles(member):
                self._write(member, first, flat[first:last].clone())

    def _write(self, member: Int8Matrix | nn.Parameter, first: int, values: torch.Tensor) -> None:
        """``values`` (host, destroyed) into the rows of ``member`` from ``first`` on."""
        if isinstance(member, Int8Matrix):
            member.write(first, values.to(self._device), random_noise(values.numel(), self._generator))
        else:
            member.detach().copy_(values.view(member.shape))

    def _pack(self, piece: Piece) -> PackedWeights:
        members = zip(piece.layout.entries, piece.of(self._members), strict=True)
        return PackedWeights(piece.layout, tuple(self._piece(member, slice(0, e.size)) for e, member in members))

    def _begin_from_here(self, piece: Piece) -> None:
        """Nothing was learned yet in ``piece``. A movement that somebody holds stays as it is."""
        self._start = self._start.replaced(piece, self._pack(piece))
        if self._carried is not None:
            self._carried = self._carried.replaced(piece, self._start.piece(piece).zeros())

    # ---- steps --------------------------------------------------------------------------------------------------

    def step(self, tokens: Tokens, learning_rate: float) -> StepResult:
        """One inner step of a whole model on ``tokens`` [B, L+1].

        Where a gradient is not finite its matrix stays as it is and the step is not ok; where the loss is not finite,
        nothing changes. Raises `DataError` for tokens of a wrong shape or outside the vocabulary, and `ResourceError`
        where even one sequence at a time does not fit into memory.
        """
        check_batch(tokens, self.passes.vocab_size)
        with self.inner_step(learning_rate, self._microbatches.number(tokens)) as step:
            loss = self._gradients(tokens, step)
        return StepResult(
            loss=loss,
            grad_norm=math.sqrt(sum(step.squared_norms)) if math.isfinite(loss) else math.nan,
            ok=math.isfinite(loss) and not step.num_skipped,
            num_microbatches=step.num_microbatches,
        )

    @contextmanager
    def inner_step(self, learning_rate: float, num_microbatches: int) -> Iterator[InnerStep]:
        """Within: so many calls of `train_microbatch`. A matrix is updated with its last gradient, vectors at the end.

        Where the loss of a microbatch was not finite, neither happens.
        """
        step = self.begin_step(learning_rate, num_microbatches)
        try:
            yield step
            if self._loss_is_finite:
                self._end_step(step)
        finally:
            self.drop_step()

    def begin_step(self, learning_rate: float, num_microbatches: int | None = None) -> InnerStep:
        """See `peer.training.passes.SpanReplica`. Of one microbatch every matrix is updated as it is passed."""
        step = InnerStep(
            learning_rate=learning_rate,
            inner=self._inner,
            num_microbatches=num_microbatches or MORE_MICROBATCHES,
            dither=self._dither,
        )
        for matrix, share in zip(self._matrices, self._usual_shares, strict=False):
            matrix.usual_share, matrix.squared_norm = share, 0.0
            matrix.begin(step)
        self._loss_is_finite, self._inner_step = True, step
        return step

    def finish_step(self, num_microbatches: int, later: Later = ()) -> StepOutcome:
        """See `peer.training.passes.SpanReplica`."""
        step = self._inner_step
        numbers = self._layout.numbers(num_microbatches, later)
        if step is None or max(numbers) < 1:
            raise SwarmError("an inner step that nothing counted towards")
        try:
            for member, number in reversed([*zip(self._members, numbers, strict=True)]):
                if isinstance(member, Int8Matrix):
                    member.finish(1 / max(1, number))
                elif member.grad is not None:
                    member.grad.div_(number)
            self._end_step(step)
        finally:
            self.drop_step()
        return StepOutcome(grad_norm=math.sqrt(sum(step.squared_norms)), ok=not step.num_skipped)

    def drop_step(self) -> None:
        """See `peer.training.passes.SpanReplica`."""
        for matrix in self._matrices:
            matrix.end()
        self._optimizer.zero_grad(set_to_none=True)
        self._inner_step = None

    def train_microbatch(self, given: Microbatch) -> Trained:
        """There and back through this span, and through those after it; within an `inner_step`.

        Raises `DataError` for tokens or hidden states of a wrong shape, or tokens outside the vocabulary.
        """
        trained = self.passes.train(given, self.passes.backward)
        self._loss_is_finite &= not math.isnan(trained.loss)
        return trained

    def forward(self, given: Microbatch) -> Passed:
        """See `peer.training.passes.SpanReplica`."""
        passed, step = self._pieces.forward(given), self._inner_step
        if passed.again is not None and step is not None and step.num_microbatches != MORE_MICROBATCHES:
            step.num_microbatches = MORE_MICROBATCHES  # as many gradients as pieces: they wait for the step's end
            for matrix in self._matrices:
                matrix.begin(step)
        return passed

    def backward(self, passed: Passed, gradient_BLH: torch.Tensor | None, *, counts: bool = True) -> Trained:
        """See `peer.training.passes.SpanReplica`."""
        if counts:
            return self._pieces.backward(passed, gradient_BLH)
        gathered = [vector.grad for vector in self._vectors]
        for matrix in self._matrices:
            matrix.is_muted = True
        try:
            self._optimizer.zero_grad(set_to_none=True)
            return self._pieces.backward(passed, gradient_BLH)
        finally:
            for matrix in self._matrices:
                matrix.is_muted = False
            for vector, gradient in zip(self._vectors, gathered, strict=True):
                vector.grad = gradient

    def _loss(
        self, hidden_NI: torch.Tensor, targets_N: torch.Tensor, weight: float | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._head is None:
            raise SwarmError("a span without the head has no loss")
        with torch.no_grad():
            return cross_entropy(self._head, hidden_NI, targets_N, weight)

    def _end_step(self, step: InnerStep) -> None:
        squared_norms = [matrix.squared_norm for matrix in self._matrices] + [self._update_vectors(step)]
        self._usual_shares = next_shares(self._usual_shares, squared_norms)

    def _gradients(self, tokens: Tokens, step: InnerStep) -> float:
        """All gradients of the mean loss; whenever memory runs out, again in halves, and so from then.

        Matrices that were updated before memory ran out are not updated again.
        """
        while True:
            try:
                return self._accumulate(tokens)
            except torch.OutOfMemoryError as error:
                self._microbatches.must_shrink(len(tokens), error)
            # Outside the handler, where the exception no longer keeps the failed step's tensors alive.
            self._microbatches.halve(len(tokens))
            step.num_microbatches = self._microbatches.number(tokens)
            self._optimizer.zero_grad(set_to_none=True)
            for matrix in self._matrices:
                if matrix.is_expecting:
                    matrix.begin(step)

    def _accumulate(self, tokens: Tokens) -> float:
        weight, total = 1 / tokens[:, 1:].size, 0.0
        for piece in self._microbatches.of(tokens):
            total += self.train_microbatch(Microbatch(tokens=piece, weight=weight)).loss * weight
            if not math.isfinite(total):
                return math.nan
        return total

    def _update_vectors(self, step: InnerStep) -> float:
        """Gives the squared norm of their gradients."""
        if not self._vectors:
            return 0.0
        norm = float(torch.nn.utils.get_total_norm([v.grad for v in self._vectors if v.grad is not None]))
        step.squared_norms.append(norm * norm)
        if not math.isfinite(norm):
            step.num_skipped += 1
            return norm
        whole = torch.tensor(step.norm.with_tensor(norm * norm, self._usual_shares[-1]), device=self._device)
        torch.nn.utils.clip_grads_with_norm_(self._vectors, self._inner.clip_norm, whole)
        for group in self._optimizer.param_groups:
            group["lr"] = step.learning_rate
        self._optimizer.step()
        return norm * norm

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, anchor: Float32, batches: Iterable[Tokens]) -> float:
        """Mean loss of the exact ``anchor`` of a whole model in nats per token; weights and optimizer stay as they are.

        The anchor stays on the host; its matrices visit the device one at a time. Nobody may change it meanwhile.
        Raises `DataError` where there are no batches, and `ResourceError` where memory runs out.
        """
        if self._head is None or not self.passes.has_embedding:
            raise SwarmError("a span that is not the whole model has no loss of its own")
        pieces = (piece for tokens in batches for piece in self._microbatches.of(tokens))
        with holding(self._model, self._members, views_of(self._layout, anchor)):
            return mean_loss(self.passes, pieces)

    def measure(self, given: Microbatch, anchors: Sequence[Float32], values: slice | None = None) -> Measured:
        """See `peer.training.passes.SpanReplica`."""
        piece = self._layout.piece(values)
        with holding(self._model, piece.of(self._members), views_of_shards(piece, anchors)):
            return self._pieces.measure(given)

    # ---- small things -------------------------------------------------------------------------------------------

    def persistent_tensors(self) -> list[torch.Tensor]:
        """All that the replica keeps on the device between steps, but for buffers of the model (positions)."""
        states = self._optimizer.state.values()
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        matrices = [tensor for matrix in self._matrices for tensor in matrix.tensors()]
        return [self._dither.table, *matrices, *self._vectors, *moments]


def _row_tiles(member: Int8Matrix | nn.Parameter) -> list[tuple[int, int]]:
    return list(member.tiles(LANDING_VALUES)) if isinstance(member, Int8Matrix) else [(0, member.shape[0])]
