"""Measuring a model without its memory: sizes of its tensors, and what one pass through it keeps for the way back.

Decides how activations are counted: the model runs once, there and back, with tensors that have shapes but no values;
whatever autograd saves is summed, by layer, and what lives besides on the way back is watched. So the figures are those
of the family's own code, for any family, and nothing is allocated. Leaves what follows to `swarm.memory_plan`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peer.training.span import materialise
from swarm.families import Family
from swarm.memory_plan import Activations, ModelNumbers


def measure(model: Any, family: Family, batch: int, sequence: int, compute: torch.dtype) -> ModelNumbers:
    """Figures of a whole ``model`` (parameters on the meta device; it is used up) at B sequences of L tokens.

    ``compute``: in which precision linear layers work and keep their inputs.
    """
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    buffers = {buffer.untyped_storage().data_ptr(): buffer.nbytes for buffer in model.buffers()}
    base = getattr(model, family.base)
    layers = list(getattr(base, family.layers))
    with FakeTensorMode() as mode:
        materialise(model, ((name, torch.empty(shape)) for name, shape in shapes))
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, mode.from_tensor(buffer))
        embedding = getattr(base, family.embedding)
        given = torch.empty((batch, sequence, embedding.embedding_dim), requires_grad=True)
        _compute_in(base, compute)
        kept, scratch = _one_pass(base, layers, given, compute)
    within = f"{family.base}.{family.layers}."
    ends = (f"{family.base}.{family.norm}.", f"{family.head}.")
    return ModelNumbers(
        vocab=embedding.num_embeddings,
        hidden=embedding.embedding_dim,
        layers=tuple(
            tuple(shape for name, shape in shapes if name.startswith(f"{within}{index}."))
            for index in range(len(layers))
        ),
        embedding=tuple(shape for name, shape in shapes if not name.startswith((within, *ends))),
        head=tuple(shape for name, shape in shapes if name.startswith(ends)),
        is_tied=not any(name == f"{family.head}.weight" for name, _ in shapes),
        buffer_bytes=sum(buffers.values()),
        activations=Activations(
            batch=batch,
            sequence=sequence,
            compute_bytes=compute.itemsize,
            embedding=kept[0],
            layers=kept[1:-1],
            # The head keeps its input: a copy where it computes in another precision.
            head=kept[-1] + (given.numel() * compute.itemsize if compute != torch.float32 else 0),
            scratch=scratch,
        ),
    )


class _Linear(torch.autograd.Function):
    """What a linear layer keeps, whatever form its weights have: its input, in the precision that it works in."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(hidden.to(compute))
        return hidden.new_empty((*hidden.shape[:-1], len(weight)), dtype=compute)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        return torch.empty_like(hidden), None, None


class _ComputeLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, compute: torch.dtype) -> None:
        super().__init__()
        self.weight, self.compute = weight, compute

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Linear.apply(hidden, self.weight, self.compute)  # type: ignore[no-untyped-call]
        return result


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``peak``: the most bytes that lived at once, of what was made within, since `watch`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0
        self.peak: float = math.inf

    def watch(self) -> None:
        self.peak = 0
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._living:
                    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._living[storage._cdata] = (reference, storage.nbytes())
                    self._at_most += storage.nbytes()
        if self._at_most > self.peak:  # only then can there be a new peak: who is gone need not be known before
            self._look()
        return result

    def _look(self) -> None:
        gone = [key for key, entry in self._living.items() if entry[0].expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._living[key]
        self._at_most = sum(size for _, size in self._living.values())
        self.peak = max(self.peak, self._at_most)


def _compute_in(model: nn.Module, compute: torch.dtype) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _ComputeLinear(child.weight, compute))


def _one_pass(
    base: Any, layers: list[nn.Module], given: torch.Tensor, compute: torch.dtype
) -> tuple[tuple[int, ...], int]:
    """Bytes that autograd keeps from before the layers, from each layer and from after them (shared memory once); and
    the most that lives besides them while the gradient of ``given`` is made."""
    kept = [0] * (len(layers) + 2)
    own = {tensor.untyped_storage()._cdata for tensor in (*base.parameters(), *base.buffers())}
    place = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            own.add(storage._cdata)
            kept[place] += storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        def hook(*_: Any) -> None:
            nonlocal place
            place = number

        return hook

    for number, layer in enumerate(layers, start=1):
        layer.register_forward_pre_hook(enter(number))
    layers[-1].register_forward_hook(enter(len(layers) + 1))
    # In bf16 everything around the linear layers follows the rules of autocast, as it does in a replica.
    precision = torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16)
    with _Living() as living:
        with precision, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = base(inputs_embeds=given, use_cache=False).last_hidden_state
        living.watch()
        result.backward(torch.empty_like(result))
    return tuple(kept), max(0, int(living.peak) - sum(kept))
