"""The outer momentum after checkpoint rounds, as a seed peer serves it to auditors out of its archive.

Decides what is told of it: the digests of its chunks, computed once for each file and kept while it lies there, so that
no question makes this peer read a file again or forget what another asks about. The bytes are read in place.
Leaves writing and forgetting the files to `peer.checkpoints.gathering`, and what to believe to whoever asks: a
checkpoint's manifest names the root over these digests.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from peer.rounds.archive import momentum_path
from swarm.digest import STATE_CHUNK_BYTES, sha256
from swarm.errors import Busy
from swarm.file_ranges import FileRange, FileRanges, read_range
from swarm.proto.round_pb2 import StateReply


@dataclass(frozen=True, slots=True)
class _Told:
    version: tuple[int, int]
    reply: StateReply
    ranges: FileRanges


class Momenta:
    """Methods may be called from any thread. Itself a source of `peer.p2p.chunk_store.ChunkStore`."""

    def __init__(self, folder: Path) -> None:
        """``folder``: the run's; that of a volunteer holds no momentum."""
        self._folder = folder
        self._told: dict[Path, _Told] = {}
        self._reading = threading.Lock()

    def offer(self, round_number: int, shard: int) -> StateReply:
        """The digests of a shard's momentum after a round; nothing where it is not here. Reads the file once.

        Raises `Busy` while a file is read: those who ask meanwhile hold no thread.
        """
        path = momentum_path(self._folder, round_number, shard)
        try:
            status = path.stat()
            version = (status.st_mtime_ns, status.st_size)  # of a branch that was given up another file lies there
            told = self._told.get(path)
            if told is not None and told.version == version:
                return told.reply
            if not self._reading.acquire(blocking=False):
                raise Busy("busy: a momentum is being read")
            try:
                return self._note(path, version, StateReply(round=round_number))
            finally:
                self._reading.release()
        except OSError:
            self._told.pop(path, None)
            return StateReply()

    def __call__(self, digest: bytes) -> bytes | None:
        for told in list(self._told.values()):
            data = told.ranges(digest)
            if data is not None:
                return data
        return None

    def _note(self, path: Path, version: tuple[int, int], reply: StateReply) -> StateReply:
        size_bytes, ranges = version[1], dict[bytes, FileRange]()
        for start in range(0, size_bytes, STATE_CHUNK_BYTES):
            place = FileRange(path, start, min(STATE_CHUNK_BYTES, size_bytes - start))
            digest = sha256(read_range(place) or b"")
            reply.momentum_chunks.append(digest)
            ranges[digest] = place
        for gone in [other for other in list(self._told) if not other.exists()]:
            self._told.pop(gone, None)
        self._told[path] = _Told(version, reply, FileRanges(ranges))
        return reply
