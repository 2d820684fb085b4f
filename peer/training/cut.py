"""The cut: the shards of a run's model, and where each lies in the whole's flat vector.

Decides by the signed rules alone, and without memory for weights, so that everybody cuts alike; leaves which layers go
together to `swarm.sharding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peer.training import model
from peer.training.layout import slices_of
from swarm import sharding
from swarm.sharding import PieceValues, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCut:
    """``values``: in the flat vector of the whole model."""

    span: Span
    values: slice


def cut(config: Any, num_shards: int) -> tuple[ShardCut, ...]:
    """The shards of the model of ``config``, in order. Raises `SpecError` where it has fewer layers."""
    spans = shards_of(config, num_shards)
    sizes = [model.build_layout(config, span).num_values for span in spans]
    return tuple(ShardCut(span=span, values=values) for span, values in zip(spans, slices_of(sizes), strict=True))


def shards_of(config: Any, num_shards: int) -> tuple[Span, ...]:
    """Which layers are which shard."""
    num_layers = config.num_hidden_layers
    if num_shards == 1:
        return (sharding.whole(num_layers),)
    return sharding.split(num_layers, num_shards, _piece_values(config, num_layers))


def _piece_values(config: Any, num_layers: int) -> PieceValues:
    """As all layers have equally many values, three spans tell what layers and ends have."""
    if num_layers < 2:
        return PieceValues(layer=1)
    first, last = (
        model.build_layout(config, Span(first=start, last=start + 1, num_layers=num_layers)).num_values
        for start in (0, num_layers - 1)
    )
    total = model.build_layout(config).num_values
    layer = (total - first - last) // (num_layers - 2) if num_layers > 2 else 0
    return PieceValues(layer=layer, embedding=first - layer, head=last - layer)
