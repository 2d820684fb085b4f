"""Copies of all shards after one round, each taken when its shard stood there, joined into the model of that round.

Decides which copies belong together and when one will never be whole; leaves which rounds are wanted to the runtime.
Copies are files without a name: nobody else can open them, and they are gone when their array is.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from peer.checkpoints.checkpoint import ShardParts
from peer.checkpoints.publishing import StateCopy
from peer.rounds.archive import forget_momentum, momentum_path
from peer.rounds.shard import Shard, state_bytes
from peer.training.layout import VALUE_BYTES, slices_of
from swarm.files import disk_errors, write_durably
from swarm.log import LogHead

MAX_ROUNDS = 3

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Copy:
    file: IO[bytes]
    heads: dict[int, LogHead] = field(default_factory=dict)
    states: dict[int, ShardParts] = field(default_factory=dict)


class Gathering:
    """Methods may be called from any thread."""

    def __init__(self, folder: Path, sizes: Sequence[int], archive: bool = False) -> None:
        """``sizes``: values of each shard of the run, in order; ``folder`` is where files lie.

        ``archive``: the momentum stays there, beside the checkpoint, for auditors to start from.
        """
        self._folder, self._places, self._archive = folder, slices_of(sizes), archive
        self._copies: dict[int, _Copy] = {}
        self._lock = threading.Lock()

    @property
    def rounds(self) -> tuple[int, ...]:
        """Of which some shards are here and others are not."""
        return tuple(self._copies)

    def add(self, head: LogHead, shard: Shard) -> StateCopy | None:
        """Copy the anchor of ``shard``, which stands at ``head``; the whole model where this was the last to come.

        Nobody may change the anchor meanwhile. Raises `DiskFull`.
        """
        with self._lock, disk_errors(self._folder):
            self._drop_passed(head)
            if head.round not in self._copies:
                self._copies[head.round] = _Copy(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
            copy = self._copies[head.round]
            # Also where there is one already: it may be of a branch that was given up.
            _write(copy.file, self._places[shard.index].start * VALUE_BYTES, state_bytes(shard.anchor))
            copy.heads[shard.index] = head
            if self._archive:
                write_durably(momentum_path(self._folder, head.round, shard.index), shard.momentum.data.data)
            copy.states[shard.index] = ShardParts(
                num_values=shard.num_values,
                state_digest=shard.state_digest,
                momentum_digest=shard.momentum_digest,
                log_digest=head.log_digest,
            )
            return self._taken(head.round) if len(copy.states) == len(self._places) else None

    def forget(self, number: int) -> None:
        """Let go of the copies of a round, where there are any."""
        with self._lock:
            self._drop(number)

    def _taken(self, number: int) -> StateCopy:
        copy = self._copies.pop(number)
        with copy.file as file:
            size = (self._places[-1].stop,)
            anchor = np.memmap(file, "<f4", mode="c", shape=size).view(np.ndarray)
        return StateCopy(
            round=number,
            total_tokens=copy.heads[0].total_tokens,
            states=tuple(copy.states[shard] for shard in range(len(self._places))),
            anchor=anchor,
        )

    def _drop_passed(self, head: LogHead) -> None:
        """A shard that stands further on never comes to a round that it has no copy of; and there is a limit."""
        passed = [n for n, copy in self._copies.items() if n < head.round and head.shard not in copy.states]
        kept = [n for n in sorted(self._copies) if n not in passed and n != head.round]
        for number in [*passed, *kept[: max(0, len(kept) + 1 - MAX_ROUNDS)]]:
            log.info("round %d: not all shards were seen there", number)
            self._drop(number)

    def _drop(self, number: int) -> None:
        copy = self._copies.pop(number, None)
        if copy is None:
            return
        copy.file.close()
        if self._archive:
            forget_momentum(self._folder, number, len(self._places))


def _write(file: IO[bytes], offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        offset, data = offset + written, data[written:]
