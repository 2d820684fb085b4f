"""A model of `transformers`, whole or of a span, with 8-bit modules in place of its linear and embedding layers.

Decides which modules are replaced, and that no matrix is left in fp32. Leaves what the modules do to
`peer.training.int8_modules`, and the replica to `peer.training.int8_replica`.
"""

from __future__ import annotations

import torch
from torch import nn

from peer.training.int8_matrix import Int8Matrix
from peer.training.int8_modules import Int8Embedding, Int8Linear
from peer.training.layout import Layout
from swarm.errors import SwarmError
from swarm.run_spec import Inner


def replace_matrices(
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


def materialise_vectors(
    model: nn.Module, members: list[Int8Matrix | nn.Parameter], device: torch.device
) -> list[Int8Matrix | nn.Parameter]:
    """Zeros in the place of vectors on the meta device; gives the members with these."""
    zeros: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, vector in list(module.named_parameters(recurse=False)):
            zeros[id(vector)] = nn.Parameter(torch.zeros(vector.shape, device=device))
            setattr(module, name, zeros[id(vector)])
    return [member if isinstance(member, Int8Matrix) else zeros[id(member)] for member in members]
