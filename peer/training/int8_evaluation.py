"""The exact anchor in the place of an 8-bit replica's weights, for as long as its loss is measured.

Decides how weights are set aside and put back; leaves which anchor and which batches to `peer.training.int8_replica`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from peer.training.int8_matrix import Int8Matrix
from peer.training.int8_modules import Int8Linear, cross_entropy
from peer.training.microbatches import Tokens
from peer.training.passes import Passes
from swarm.errors import DataError


@contextmanager
def holding(
    model: nn.Module, members: Sequence[Int8Matrix | nn.Parameter], anchor: Sequence[torch.Tensor]
) -> Iterator[None]:
    """``model`` computes with ``anchor``; its own weights are set aside, not copied, and put back afterwards."""
    own = [None if isinstance(member, Int8Matrix) else member.data for member in members]
    try:
        for member, value in zip(members, anchor, strict=True):
            if isinstance(member, Int8Matrix):
                member.held = value.view(member.rows, member.columns)
            else:
                member.data = value.to(member.device)
        model.eval()
        yield
    finally:
        for member, data in zip(members, own, strict=True):
            if isinstance(member, Int8Matrix):
                member.held = None
            elif data is not None:
                member.data = data
        model.train()


def mean_loss(passes: Passes, head: Int8Linear, pieces: Iterable[Tokens]) -> float:
    """Of a whole model in nats per token. Raises `DataError` where there are no ``pieces``."""
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for piece in pieces:
            batch_BL = passes.batch(piece)
            hidden_NI, targets_N = passes.hidden(batch_BL[:, :-1]).flatten(0, 1), batch_BL[:, 1:].flatten()
            total += cross_entropy(head, hidden_NI, targets_N, None)[0].item()
            num_tokens += len(targets_N)
    if num_tokens == 0:
        raise DataError("there are no validation batches")
    return total / num_tokens
