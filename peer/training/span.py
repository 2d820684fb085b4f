"""Spans: the module of a contiguous run of layers, cut out of a whole model before it has any memory.

Decides what a span keeps (its layers under the whole model's names; embedding and what belongs to it only in the first,
norm and head only in the last), how it is called (tokens or hidden states in, hidden states or logits out) and where
random weights come from. Leaves configs and the choice of the model's class to `peer.training.model`, where parts live
to `swarm.families`. The family's own forward runs unchanged: it computes positions, rotary angles, ALiBi and
masks from the shape of its input alone, so they are the same for each layer of every span; parts that a span lacks pass
through what they are given.

Shapes: tokens [B, L] int64; hidden [B, L, H]; logits [B, L, V].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from swarm.digest import sha256
from swarm.errors import SwarmError
from swarm.families import Family
from swarm.sharding import Span

CPU = torch.device("cpu")


class NoPositions(nn.Module):
    """In the place of a learned position embedding: hidden states of a later span already hold their positions."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=positions.device)


def cut(model: Any, family: Family, span: Span) -> None:
    """Make the whole ``model`` that of ``span``, in place. Raises `SwarmError` where the table does not fit it."""
    base = getattr(model, family.base)
    holders = {name for name, child in base.named_children() if _holds_tensors(child)}
    if not holders <= family.children or not isinstance(getattr(base, family.layers, None), nn.ModuleList):
        raise SwarmError(f"the family table does not know these parts: {sorted(holders - family.children)}")
    layers = getattr(base, family.layers)
    if len(layers) != span.num_layers:
        raise SwarmError(f"a span of a model of {span.num_layers} layers does not fit one of {len(layers)}")
    for index in set(range(span.num_layers)) - set(range(span.first, span.last)):
        delattr(layers, str(index))  # the others keep their names: layer indices of the whole model
    if not span.has_embedding:
        _let_pass(base, family)
    if not span.has_head:
        setattr(base, family.norm, nn.Identity())
        setattr(model, family.head, nn.Identity())


def from_layer(model: Any, family: Family, first: int) -> Any:
    """``model`` without what comes before layer ``first``: other modules around the same layers, without a copy."""
    later, base = copy.copy(model), copy.copy(getattr(model, family.base))
    layers = copy.copy(getattr(base, family.layers))
    for module in (later, base, layers):
        module._modules = dict(module._modules)
    for name in [name for name in layers._modules if int(name) < first]:
        delattr(layers, name)
    setattr(base, family.layers, layers)
    _let_pass(base, family)
    setattr(later, family.base, base)
    return later


def _let_pass(base: Any, family: Family) -> None:
    """Hidden states in the place of tokens."""
    setattr(base, family.embedding, nn.Identity())
    if family.positions:
        setattr(base, family.positions, NoPositions())
    if family.embedding_norm:
        setattr(base, family.embedding_norm, nn.Identity())


def forward(model: Any, span: Span, value: torch.Tensor) -> torch.Tensor:
    """Tokens (first span) or hidden states through ``span``: hidden states, or logits where it has the head."""
    given = {"input_ids": value} if span.has_embedding else {"inputs_embeds": value}
    result: torch.Tensor = model(**given, use_cache=False).logits
    return result


def own_buffers(model: Any, device: torch.device = CPU) -> None:
    """Give a model on the meta device the values of its buffers (angles, masks); equal ones share their memory."""
    shared: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        for module in model.modules():
            names = [name for name, _ in module.named_buffers(recurse=False)]
            for name in names:
                setattr(module, name, torch.zeros_like(getattr(module, name), device=CPU))
            if names:
                model._init_weights(module)
            for name in names:
                value = getattr(module, name)
                known = shared.setdefault((tuple(value.shape), value.dtype), [])
                twin = next((other for other in known if torch.equal(other.to(CPU), value)), None)
                if twin is None:
                    twin = value.to(device)
                    known.append(twin)
                setattr(module, name, twin)


def initial_values(model: Any, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights of a ``model`` on the meta device, as its family draws them: (name, fp32 on the CPU), in order.

    The generator starts anew for each module, from ``seed`` and the module's full name; so a parameter's values do not
    depend on which other parameters the model has, and those of a whole model are those of its spans. Memory: one
    module at a time. Raises `SwarmError` for a parameter that the family leaves undefined.
    """
    wanted = {name for name, _ in model.named_parameters()}  # a tied matrix has one name, the embedding's
    for prefix, module in model.named_modules():
        empty = dict(module.named_parameters(recurse=False))
        if not empty:
            continue
        for name, parameter in empty.items():
            value = torch.full(parameter.shape, math.nan, dtype=torch.float32)
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_module_seed(seed, prefix))
            model._init_weights(module)
        drawn = {name: getattr(module, name).detach() for name in empty}
        for name, parameter in empty.items():
            setattr(module, name, parameter)
        for name, value in drawn.items():
            if torch.isnan(value).any():
                raise SwarmError(f"{prefix}.{name} has no initial values in this family")
            if f"{prefix}.{name}" in wanted:
                yield f"{prefix}.{name}", value


def materialise(model: nn.Module, values: Iterable[tuple[str, torch.Tensor]], device: torch.device = CPU) -> None:
    """Put ``values`` in the place of parameters on the meta device, tied ones once; each name must come once.

    Raises `SwarmError` for unknown, missing or misshapen values.
    """
    names = {name: parameter for name, parameter in model.named_parameters()}
    filled: dict[int, nn.Parameter] = {}
    for name, value in values:
        parameter = names.pop(name, None)
        if parameter is None or parameter.shape != value.shape:
            raise SwarmError(f"{name} of shape {tuple(value.shape)} is no parameter of this span")
        filled[id(parameter)] = nn.Parameter(value.to(device, torch.float32), requires_grad=parameter.requires_grad)
    if names:
        raise SwarmError(f"no values for {sorted(names)[:3]}")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, filled[id(parameter)])


def _module_seed(seed: int, name: str) -> int:
    return int.from_bytes(sha256(f"swarm.v1 weights {seed} {name}".encode())[:8], "little") >> 1


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
