"""The flat layout of a span: every parameter, in the model's own order, as one fp32 vector. So the vectors of its
shards lie in it one after the other.

Pure. Decides where a parameter lies in anchor, momentum, pseudo-gradient and snapshot. Leaves where names and shapes
come from to `peer.training.model`, and slices and parts, which cut the vector without looking at it, to the round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from peer.rounds.codec import Float32
from swarm.errors import SwarmError

VALUE_BYTES = 4

T = TypeVar("T")


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

    def piece(self, values: slice | None) -> Piece:
        """The parameters that ``values`` are made of; None: all. Raises `SwarmError` where one would be cut."""
        first, last, _ = (values or slice(None)).indices(self.num_values)
        inside = [i for i, entry in enumerate(self.entries) if first <= entry.offset and _end(entry) <= last]
        layout = Layout.of((self.entries[i].name, self.entries[i].shape) for i in inside)
        if layout.num_values != last - first:
            raise SwarmError(f"values {first} to {last} are not whole parameters")
        return Piece(values=slice(first, last), indices=range(inside[0], inside[-1] + 1), layout=layout)

    def numbers(self, of_all: int, more: Iterable[tuple[slice, int]]) -> list[int]:
        """A number for each parameter: ``of_all``, and what ``more`` says of the values that it lies in."""
        numbers = [of_all] * len(self.entries)
        for values, number in more:
            for index in self.piece(values).indices:
                numbers[index] += number
        return numbers

    def views(self, flat: Float32) -> dict[str, Float32]:
        """Every parameter by name, as a view into ``flat`` (no copy). Raises `SwarmError` for another length."""
        if flat.ndim != 1 or len(flat) != self.num_values:
            raise SwarmError(f"a vector of shape {flat.shape} does not hold the {self.num_values} values of the layout")
        return {
            entry.name: flat[entry.offset : entry.offset + entry.size].reshape(entry.shape) for entry in self.entries
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive parameters of a layout: at ``indices``, where ``values`` lie; with a layout of their own."""

    values: slice
    indices: range
    layout: Layout

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Those of ``items``, one per parameter of the whole layout, that are in the piece."""
        return items[self.indices.start : self.indices.stop]


def slices_of(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Where vectors of ``sizes`` values lie, one after the other, in one."""
    return tuple(slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True))


def _end(entry: Entry) -> int:
    return entry.offset + entry.size
