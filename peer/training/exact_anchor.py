"""The exact anchor in the place of a replica's weights, for as long as its loss is measured.

Decides how weights are set aside and put back, and what a mean loss is; leaves which anchor and which batches to the
replicas, and losses over the spans of several peers to `peer.pipeline.evaluation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from peer.training.int8_matrix import Int8Matrix
from peer.training.microbatches import Microbatch, Tokens
from peer.training.passes import Passes
from swarm.errors import DataError, ResourceError

Members = Sequence[Int8Matrix | nn.Parameter]


@contextmanager
def holding(model: nn.Module, members: Members, anchor: Sequence[torch.Tensor]) -> Iterator[None]:
    """``model`` computes with ``anchor`` for ``members``; their own weights are set aside, not copied, and put back.

    Raises `ResourceError` where memory runs out.
    """
    own = [None if isinstance(member, Int8Matrix) else member.data for member in members]
    try:
        for member, value in zip(members, anchor, strict=True):
            if isinstance(member, Int8Matrix):
                member.held = value.view(member.rows, member.columns)
            else:
                member.data = value.to(member.device)
        model.eval()
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError("an evaluation does not fit into the memory of the device") from error
    finally:
        for member, data in zip(members, own, strict=True):
            if isinstance(member, Int8Matrix):
                member.held = None
            elif data is not None:
                member.data = data
        model.train()


def mean_loss(passes: Passes, pieces: Iterable[Tokens]) -> float:
    """Of a whole model in nats per token. Raises `DataError` where there are no ``pieces``."""
    total, num_tokens = 0.0, 0
    for piece in pieces:
        total += passes.measure(Microbatch(tokens=piece, weight=0.0)).loss
        num_tokens += piece[:, 1:].size
    if num_tokens == 0:
        raise DataError("there are no validation batches")
    return total / num_tokens
