"""Sharding: which layers of a model are which shard, and what a span of shards owns.

Pure, and a function of the signed rules alone, so that everybody cuts a model alike. Decides the cut; leaves making the
pieces to `peer.training.span`, what they weigh to `swarm.memory_plan`, and who hosts which to the peers.

The first shard also has the embedding, the last one the final norm and the head. A model of more than one shard has
embedding and head as two matrices (untied): no two peers could keep one matrix equal between rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from swarm.errors import SpecError, SwarmError


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Layers [``first``, ``last``) of a model of ``num_layers``; a shard, several in a row, or the whole model."""

    first: int
    last: int
    num_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= self.num_layers:
            raise SwarmError(f"layers [{self.first}, {self.last}) are no span of a model of {self.num_layers} layers")

    @property
    def has_embedding(self) -> bool:
        return self.first == 0

    @property
    def has_head(self) -> bool:
        """Whether the final norm and the head are in it."""
        return self.last == self.num_layers

    @property
    def is_whole(self) -> bool:
        return self.has_embedding and self.has_head

    @property
    def size(self) -> int:
        """Number of layers."""
        return self.last - self.first

    def __str__(self) -> str:
        ends = ["embedding"] * self.has_embedding + ["head"] * self.has_head
        layers = f"layer {self.first}" if self.size == 1 else f"layers {self.first}-{self.last - 1}"
        return " + ".join([layers, *ends])


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceValues:
    """How many parameters the pieces of a model have; all layers have equally many."""

    layer: int
    embedding: int = 0
    head: int = 0


def whole(num_layers: int) -> Span:
    return Span(first=0, last=num_layers, num_layers=num_layers)


def split(num_layers: int, num_shards: int, values: PieceValues) -> tuple[Span, ...]:
    """The shards of a model, so that the largest has as few parameters as can be.

    Each starts with one layer and its end's matrices; every other layer goes to the shard that is smallest then (the
    earliest of equals). As layers are alike, no other cut has a smaller largest shard. Raises `SpecError` where there
    are fewer layers than shards.
    """
    if not 1 <= num_shards <= num_layers:
        raise SpecError(
            f"num_shards: a model of {num_layers} layers cannot be cut into {num_shards} shards",
            f"set num_shards to 1 ... {num_layers}",
        )
    sizes = [1] * num_shards
    weights = [values.layer] * num_shards
    weights[0] += values.embedding
    weights[-1] += values.head
    for _ in range(num_layers - num_shards):
        smallest = weights.index(min(weights))
        sizes[smallest] += 1
        weights[smallest] += values.layer
    return from_sizes(sizes)


def from_sizes(sizes: Sequence[int]) -> tuple[Span, ...]:
    """Spans of ``sizes`` layers, one after another, that make up a whole model."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return tuple(Span(first=end - size, last=end, num_layers=ends[-1]) for size, end in zip(sizes, ends, strict=True))


def join(shards: Sequence[Span]) -> Span:
    """The span of neighbouring ``shards``. Raises `SwarmError` where they are not neighbours, in order."""
    if not shards or any(left.last != right.first for left, right in pairwise(shards)):
        raise SwarmError("a span is made of neighbouring shards")
    return Span(first=shards[0].first, last=shards[-1].last, num_layers=shards[0].num_layers)


def spans(shards: Sequence[Span]) -> tuple[Span, ...]:
    """Every span that a peer could host: all runs of neighbouring ``shards``, the shortest first."""
    return tuple(
        join(shards[start : start + count])
        for count in range(1, len(shards) + 1)
        for start in range(len(shards) - count + 1)
    )
