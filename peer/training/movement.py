"""Movement: what a replica learned since the anchor, kept in as few bytes as it takes.

Decides how weights lie packed on the host (matrices as int8 codes and fp32 scales per block, small vectors as fp32)
and what the movement of an 8-bit replica is: its weights now minus those it had right after landing, plus what it
carried over that landing (design 5.2, 5.4.7). So neither quantising the anchor nor carrying over adds anything to the
pseudo-gradient that the replica did not do. Pure numpy. Leaves quantising to `peer.training.quantized`.

Values are made on demand, a slice at a time: ``movement[first:last]`` is a float32 vector, as it is of a plain vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from peer.rounds.codec import Float32
from peer.training.layout import Entry, Layout, Piece

# Values that share a scale.
BLOCK_VALUES = 256


class Movement(Protocol):
    """A float32 vector, or what gives slices of one."""

    def __len__(self) -> int: ...
    def __getitem__(self, values: slice, /) -> Float32: ...


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """One parameter: ``codes`` int8 with ``scales``, one per block, or ``codes`` float32 without."""

    codes: npt.NDArray[np.int8] | Float32
    scales: Float32 | None

    def values(self, first: int, last: int) -> Float32:
        if self.scales is None:
            return np.array(self.codes[first:last], np.float32)
        low = first // BLOCK_VALUES
        scales = np.repeat(self.scales[low : -(-last // BLOCK_VALUES)], BLOCK_VALUES)
        start = first - low * BLOCK_VALUES
        return np.multiply(self.codes[first:last], scales[start : start + last - first], dtype=np.float32)

    def write(self, first: int, other: PackedEntry) -> None:
        """Put ``other``, a piece of the same kind, where the values from ``first`` on are; whole blocks."""
        self.codes[first : first + len(other.codes)] = other.codes
        if self.scales is not None and other.scales is not None:
            self.scales[first // BLOCK_VALUES :][: len(other.scales)] = other.scales

    def zeros(self) -> PackedEntry:
        return PackedEntry(np.zeros_like(self.codes), None if self.scales is None else np.zeros_like(self.scales))

    @property
    def size_bytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Weights (or a movement) of a whole layout."""

    layout: Layout
    entries: tuple[PackedEntry, ...]

    def __len__(self) -> int:
        return self.layout.num_values

    def __getitem__(self, values: slice) -> Float32:
        first, last, _ = values.indices(len(self))
        parts = [
            packed.values(max(first, entry.offset) - entry.offset, min(last, entry.offset + entry.size) - entry.offset)
            for entry, packed in zip(self.layout.entries, self.entries, strict=True)
            if _overlaps(entry, first, last)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def piece(self, piece: Piece) -> PackedWeights:
        """Those of ``piece``, without a copy."""
        return PackedWeights(piece.layout, tuple(piece.of(self.entries)))

    def zeros(self) -> PackedWeights:
        """No movement, in room of its own."""
        return PackedWeights(self.layout, tuple(entry.zeros() for entry in self.entries))

    def replaced(self, piece: Piece, other: PackedWeights) -> PackedWeights:
        """These weights, but for ``piece``, which is ``other``; without a copy."""
        first, last = piece.indices.start, piece.indices.stop
        return PackedWeights(self.layout, (*self.entries[:first], *other.entries, *self.entries[last:]))

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaMovement:
    """``now - start + carried``. Holding one costs no copy but that of ``now``: it is good until the replica lands."""

    now: PackedWeights
    start: PackedWeights
    carried: PackedWeights | None

    def __len__(self) -> int:
        return len(self.now)

    def __getitem__(self, values: slice) -> Float32:
        moved = self.now[values]
        moved -= self.start[values]
        if self.carried is not None:
            moved += self.carried[values]
        return moved


def _overlaps(entry: Entry, first: int, last: int) -> bool:
    return entry.offset < last and first < entry.offset + entry.size
