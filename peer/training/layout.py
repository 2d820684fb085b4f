"""The flat layout of a shard: every parameter, in the model's own order, as one fp32 vector.

Pure. Decides where a parameter lies in anchor, momentum, pseudo-gradient and snapshot. Leaves where names and shapes
come from to `peer.training.model`, and slices and parts, which cut the vector without looking at it, to the round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peer.rounds.codec import Float32
from swarm.errors import SwarmError

VALUE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One parameter: ``size`` values from ``offset`` on, in C order."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]]) -> Layout:
        """The layout of parameters in the order given. Raises `SwarmError` for a name that comes twice."""
        entries: list[Entry] = []
        offset = 0
        for name, shape in shapes:
            size = math.prod(shape)
            entries.append(Entry(name=name, shape=tuple(shape), offset=offset, size=size))
            offset += size
        if len({entry.name for entry in entries}) != len(entries):
            raise SwarmError("a layout names a parameter twice")
        return cls(tuple(entries))

    @property
    def num_values(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def size_bytes(self) -> int:
        """Bytes of one flat fp32 vector."""
        return VALUE_BYTES * self.num_values

    def views(self, flat: Float32) -> dict[str, Float32]:
        """Every parameter by name, as a view into ``flat`` (no copy). Raises `SwarmError` for another length."""
        if flat.ndim != 1 or len(flat) != self.num_values:
            raise SwarmError(f"a vector of shape {flat.shape} does not hold the {self.num_values} values of the layout")
        return {
            entry.name: flat[entry.offset : entry.offset + entry.size].reshape(entry.shape) for entry in self.entries
        }
