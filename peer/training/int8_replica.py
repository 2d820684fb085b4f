"""The 8-bit replica: weights in int8, moments in 8 bits, each matrix updated within the backward pass.

Decides how a model of `transformers` becomes one whose matrices exist only in 8 bits, how one inner step is made from
there (loss, what is skipped, what happens when memory runs out), and what its movement is. Leaves a matrix's update to
`peer.training.int8_matrix`, gradients to `peer.training.int8_modules`, when steps are made to `peer.training.trainer`.
Not thread-safe: the trainer owns it.

With one microbatch a step never holds two matrices' gradients (a tied matrix keeps its own in bf16 until the last part
is there). With several (memory ran out once) gradients add up in bf16, and `StepResult.num_microbatches` says so.
Norms and biases stay in fp32 with fp32 AdamW, clipped together as one more tensor.

Everything random comes from one seeded generator: the same seed, steps and landings give the same replica on the same
machine. (Where attention's own backward pass is not deterministic, as on some GPUs, steps are not either.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from peer.rounds.codec import Float32
from peer.training.fp32_replica import StepResult, Tokens, check_batch, views_of
from peer.training.inner_optimizer import build_optimizer
from peer.training.int8_matrix import TILE_VALUES, InnerStep, Int8Matrix
from peer.training.int8_modules import Int8Embedding, Int8Linear, cross_entropy
from peer.training.layout import Layout
from peer.training.movement import BLOCK_VALUES, Movement, PackedEntry, PackedWeights, ReplicaMovement
from peer.training.quantized import num_blocks, quantise_
from swarm.errors import DataError, ResourceError, SwarmError
from swarm.run_spec import Inner


class Int8Replica:
    def __init__(self, model: nn.Module, layout: Layout, inner: Inner, device: torch.device, seed: int = 0) -> None:
        """``layout`` is the model's own, see `peer.training.model.layout_of`; ``model`` gives up its matrices.

        The parameters of ``model`` may be on the meta device, so that fp32 weights never exist: then load an anchor.
        Raises `SwarmError` for a layout of another model, or a model with matrices outside of linear and embedding
        layers.
        """
        self._layout, self._inner, self._device = layout, inner, device
        self._generator = torch.Generator(device).manual_seed(seed)
        use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._compute = torch.bfloat16 if use_bf16 else torch.float32
        if [(n, tuple(p.shape)) for n, p in model.named_parameters()] != [(e.name, e.shape) for e in layout.entries]:
            raise SwarmError("the layout is not that of the model")
        initial = [parameter.detach() for parameter in model.parameters()]
        is_empty = any(value.is_meta for value in initial)
        try:
            self._members = _replace_matrices(model, layout, inner, device, self._compute)
            if is_empty:
                self._members = _materialise_vectors(model, self._members, device)
            self._model = model.to(device).train()
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"the model does not fit into the memory of {device}", "use --device cpu") from error
        if inner.checkpoint_activations:
            # The second name is what older versions of transformers 5 call it.
            old: Any = self._model.gradient_checkpointing_enable
            getattr(self._model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        self._matrices = [member for member in self._members if isinstance(member, Int8Matrix)]
        self._vectors = [member for member in self._members if not isinstance(member, Int8Matrix)]
        self._head: Int8Linear = self._model.get_output_embeddings()  # type: ignore[operator]
        config: Any = self._model.config
        self._vocab_size: int = config.vocab_size
        self._pieces = 1
        self._optimizer = self._fresh_optimizer()
        self._carried: PackedWeights | None = None
        if not is_empty:
            self._put(initial)
        self._begin_from_here()

    # ---- weights in and out -------------------------------------------------------------------------------------

    def load(self, anchor: Float32) -> None:
        """Put the weights of ``anchor`` in, in 8 bits; moments stay. Raises `SwarmError` for a wrong length."""
        self._put(views_of(self._layout, anchor))
        self._begin_from_here()

    def reset(self, anchor: Float32) -> None:
        """Start again from ``anchor`` with fresh moments: the way out of repeated bad steps."""
        self.load(anchor)
        for matrix in self._matrices:
            matrix.moments.forget()
        self._optimizer = self._fresh_optimizer()

    def read(self) -> Float32:
        """The dequantised weights now, as a fresh flat vector on the host."""
        return self._pack()[:]

    def movement(self) -> Movement:
        """What was learned since the anchor, 1 byte a value; it stays as it is while training goes on."""
        return ReplicaMovement(now=self._pack(), start=self._start, carried=self._carried)

    def land(self, new_anchor: Float32, snapshot: Movement) -> None:
        """Weights = quantised (``new_anchor`` + what was learned since ``snapshot``), which is carried into the next.

        What is carried is itself rounded to 8 bits first, stochastically, and then used for both: so what the replica
        does from here and what its movement says agree to the bit.
        """
        if len(new_anchor) != len(snapshot) or len(new_anchor) != self._layout.num_values:
            raise SwarmError("an anchor or a snapshot of another length than the layout")
        now, carried = self.movement(), []
        anchors = views_of(self._layout, new_anchor)
        for entry, member, anchor in zip(self._layout.entries, self._members, anchors, strict=True):
            values = slice(entry.offset, entry.offset + entry.size)
            is_matrix = isinstance(member, Int8Matrix)
            packed = self._packed_difference(now, snapshot, values, in_8_bits=is_matrix)
            carried.append(packed)
            for first, last in _row_tiles(member):
                span = slice(first * anchor[0].numel(), last * anchor[0].numel())
                moved = torch.from_numpy(packed.values(span.start, span.stop))
                self._write(member, first, moved.add_(anchor.view(-1)[span]))
        self._start, self._carried = self._pack(), PackedWeights(self._layout, tuple(carried))

    def _packed_difference(self, now: Movement, then: Movement, values: slice, *, in_8_bits: bool) -> PackedEntry:
        size = values.stop - values.start
        if not in_8_bits:
            return PackedEntry(now[values] - then[values], None)
        codes, scales = torch.empty(size, dtype=torch.int8), torch.empty(num_blocks(size))
        seed = torch.randint(2**62, (), generator=self._generator, device=self._device)
        host = torch.Generator().manual_seed(int(seed))
        for first in range(0, size, TILE_VALUES):
            span = slice(first, min(first + TILE_VALUES, size))
            flat = slice(values.start + span.start, values.start + span.stop)
            moved = torch.from_numpy(now[flat] - then[flat])
            quantise_(moved, codes[span], scales[first // BLOCK_VALUES : num_blocks(span.stop)], host)
        return PackedEntry(codes.numpy(), scales.numpy())

    def _put(self, values: list[torch.Tensor]) -> None:
        for member, value in zip(self._members, values, strict=True):
            flat = value.reshape(member.shape[0], -1)
            for first, last in _row_tiles(member):
                self._write(member, first, flat[first:last].clone())

    def _write(self, member: Int8Matrix | nn.Parameter, first: int, values: torch.Tensor) -> None:
        """``values`` (host, destroyed) into the rows of ``member`` from ``first`` on."""
        if isinstance(member, Int8Matrix):
            member.write(first, values.to(self._device), self._generator)
        else:
            member.detach().copy_(values.view(member.shape))

    def _pack(self) -> PackedWeights:
        entries = []
        for member in self._members:
            if isinstance(member, Int8Matrix):
                kept = [tensor.to("cpu", copy=True).numpy() for tensor in (member.codes, member.scales)]
                entries.append(PackedEntry(kept[0], kept[1]))
            else:
                entries.append(PackedEntry(member.detach().to("cpu", copy=True).numpy().reshape(-1), None))
        return PackedWeights(self._layout, tuple(entries))

    def _begin_from_here(self) -> None:
        self._start = self._pack()
        self._carried = None

    # ---- steps --------------------------------------------------------------------------------------------------

    def step(self, tokens: Tokens, learning_rate: float) -> StepResult:
        """One inner step on ``tokens`` [B, L+1].

        Where a gradient is not finite its matrix stays as it is and the step is not ok; where the loss is not finite,
        nothing changes. Raises `DataError` for tokens of a wrong shape or outside the vocabulary, and `ResourceError`
        where even half a batch at a time does not fit into memory.
        """
        batch = self._batch(tokens)
        step = InnerStep(
            learning_rate=learning_rate,
            inner=self._inner,
            largest_norm=self._inner.clip_norm / math.sqrt(len(self._matrices) + 1),
            num_microbatches=self._pieces,
            generator=self._generator,
        )
        for matrix in self._matrices:
            matrix.begin(step)
        try:
            loss = self._gradients(batch, step)
            if math.isfinite(loss):
                self._update_vectors(step)
        finally:
            for matrix in self._matrices:
                matrix.end()
            self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss,
            grad_norm=math.sqrt(sum(step.squared_norms)) if math.isfinite(loss) else math.nan,
            ok=math.isfinite(loss) and not step.num_skipped,
            num_microbatches=step.num_microbatches,
        )

    def _gradients(self, batch_BL: torch.Tensor, step: InnerStep) -> float:
        """All gradients of the mean loss; when memory runs out, once more in two halves, and so from then.

        Matrices that were updated before memory ran out are not updated again.
        """
        try:
            return self._accumulate(batch_BL, step)
        except torch.OutOfMemoryError as error:
            if self._pieces > 1 or len(batch_BL) < 2:
                raise ResourceError(
                    f"an inner step does not fit into the memory of {self._device}",
                    "close other programs that use the device, or use --device cpu",
                ) from error
        # Outside the handler, where the exception no longer keeps the failed step's tensors alive.
        self._pieces = step.num_microbatches = 2
        self._optimizer.zero_grad(set_to_none=True)
        for matrix in self._matrices:
            if matrix.is_expecting:
                matrix.begin(step)
        return self._gradients(batch_BL, step)

    def _accumulate(self, batch_BL: torch.Tensor, step: InnerStep) -> float:
        weight, total = 1 / batch_BL[:, 1:].numel(), 0.0
        for piece in batch_BL.chunk(step.num_microbatches):
            hidden_NI = self._hidden(piece)
            leaf = hidden_NI.detach()
            with torch.no_grad():
                loss, gradient = cross_entropy(self._head, leaf, piece[:, 1:].flatten(), weight)
            total += loss.item() * weight
            if not math.isfinite(total) or gradient is None:
                return math.nan
            hidden_NI.backward(gradient.to(hidden_NI.dtype))  # type: ignore[no-untyped-call]
        return total

    def _update_vectors(self, step: InnerStep) -> None:
        if not self._vectors:
            return
        norm = float(torch.nn.utils.clip_grad_norm_(self._vectors, step.largest_norm))
        step.squared_norms.append(norm * norm)
        if not math.isfinite(norm):
            step.num_skipped += 1
            return
        for group in self._optimizer.param_groups:
            group["lr"] = step.learning_rate
        self._optimizer.step()

    def _hidden(self, batch_BL: torch.Tensor) -> torch.Tensor:
        """What the head is given, [N, I]."""
        with self._precision():
            backbone: Any = self._model.base_model
            hidden_BLI: torch.Tensor = backbone(input_ids=batch_BL[:, :-1], use_cache=False).last_hidden_state
        return hidden_BLI.flatten(0, 1)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, anchor: Float32, batches: Iterable[Tokens]) -> float:
        """Mean loss of the exact ``anchor`` in nats per token; weights and optimizer stay exactly as they are.

        The anchor stays on the host; its matrices visit the device one at a time. Nobody may change it meanwhile.
        Raises `DataError` where there are no batches, and `ResourceError` where memory runs out.
        """
        total, num_tokens = 0.0, 0
        try:
            with self._holding(anchor), torch.no_grad():
                for tokens in batches:
                    batch = self._batch(tokens)
                    targets = batch[:, 1:].flatten()
                    total += cross_entropy(self._head, self._hidden(batch), targets, None)[0].item()
                    num_tokens += len(targets)
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"an evaluation does not fit into the memory of {self._device}") from error
        if num_tokens == 0:
            raise DataError("there are no validation batches")
        return total / num_tokens

    @contextmanager
    def _holding(self, anchor: Float32) -> Iterator[None]:
        """The model computes with ``anchor``; its own weights are set aside, not copied, and put back afterwards."""
        views = views_of(self._layout, anchor)
        own = [vector.data for vector in self._vectors]
        try:
            for member, view in zip(self._members, views, strict=True):
                if isinstance(member, Int8Matrix):
                    member.held = view.view(member.rows, member.columns)
                else:
                    member.data = view.to(self._device)
            self._model.eval()
            yield
        finally:
            for matrix in self._matrices:
                matrix.held = None
            for vector, value in zip(self._vectors, own, strict=True):
                vector.data = value
            self._model.train()

    # ---- small things -------------------------------------------------------------------------------------------

    def persistent_tensors(self) -> list[torch.Tensor]:
        """All that the replica keeps on the device between steps, but for buffers of the model (positions)."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        matrices = [tensor for matrix in self._matrices for tensor in matrix.tensors()]
        return [*matrices, *self._vectors, *(value for value in moments if isinstance(value, torch.Tensor))]

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        vectors = self._vectors or [nn.Parameter(torch.zeros(1, device=self._device))]
        return build_optimizer(vectors, self._inner.model_copy(update={"optimizer": "adamw"}), self._device)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._compute == torch.bfloat16)

    def _batch(self, tokens: Tokens) -> torch.Tensor:
        check_batch(tokens, self._vocab_size)
        return torch.from_numpy(np.array(tokens)).to(self._device)


def _replace_matrices(
    model: nn.Module, layout: Layout, inner: Inner, device: torch.device, compute: torch.dtype
) -> list[Int8Matrix | nn.Parameter]:
    """Put 8-bit modules in place of linear and embedding layers; gives what holds each entry of the layout."""
    matrices: dict[int, Int8Matrix] = {}

    def matrix_of(weight: torch.Tensor) -> Int8Matrix:
        return matrices.setdefault(id(weight), Int8Matrix(tuple(weight.shape), inner, device))

    named = dict(model.named_parameters())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(matrix_of(child.weight), child.bias, compute))
            elif type(child) is nn.Embedding:
                setattr(parent, name, Int8Embedding(matrix_of(child.weight), child.padding_idx))
    members = [matrices.get(id(named[entry.name]), named[entry.name]) for entry in layout.entries]
    held = zip(layout.entries, members, strict=True)
    strange = [entry.name for entry, member in held if isinstance(member, nn.Parameter) and member.ndim > 1]
    if strange:
        raise SwarmError(f"no 8-bit module holds {', '.join(strange)}")
    return members


def _materialise_vectors(
    model: nn.Module, members: list[Int8Matrix | nn.Parameter], device: torch.device
) -> list[Int8Matrix | nn.Parameter]:
    """Zeros in the place of vectors on the meta device; gives the members with these."""
    zeros: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, vector in list(module.named_parameters(recurse=False)):
            zeros[id(vector)] = nn.Parameter(torch.zeros(vector.shape, device=device))
            setattr(module, name, zeros[id(vector)])
    return [member if isinstance(member, Int8Matrix) else zeros[id(member)] for member in members]


def _row_tiles(member: Int8Matrix | nn.Parameter) -> list[tuple[int, int]]:
    return list(member.tiles(TILE_VALUES)) if isinstance(member, Int8Matrix) else [(0, member.shape[0])]
