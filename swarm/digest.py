"""Digests: SHA-256 of bytes, Merkle roots over chunks, the hash chain of the log.

The Merkle tree follows RFC 6962 section 2.1: leaves are hashed with a 00 prefix, inner nodes with 01, and an odd
node at the end of a level moves up unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from swarm.errors import DigestError

DIGEST_BYTES = 32
STATE_CHUNK_BYTES = 1 << 20


def sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def check(data: bytes | memoryview, digest: bytes, what: str) -> None:
    """Raise `DigestError` unless ``data`` has this SHA-256."""
    if sha256(data) != digest:
        raise DigestError(f"{what}: the bytes do not match their digest {digest.hex()[:16]}")


def chunk_digests(data: memoryview, chunk_bytes: int = STATE_CHUNK_BYTES) -> list[bytes]:
    """SHA-256 of every chunk of ``data`` (the last may be shorter)."""
    return [sha256(data[start : start + chunk_bytes]) for start in range(0, len(data), chunk_bytes)]


class ChunkRoot:
    """The Merkle root over the chunks of bytes that come in pieces."""

    def __init__(self, chunk_bytes: int = STATE_CHUNK_BYTES) -> None:
        self._room = self._chunk_bytes = chunk_bytes
        self._chunk = hashlib.sha256()
        self._leaves: list[bytes] = []

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            taken, view = view[: self._room], view[self._room :]
            self._chunk.update(taken)
            self._room -= len(taken)
            if not self._room:
                self._leaves.append(self._chunk.digest())
                self._chunk, self._room = hashlib.sha256(), self._chunk_bytes

    def root(self) -> bytes:
        rest = [self._chunk.digest()] if self._room < self._chunk_bytes else []
        return merkle_root([*self._leaves, *rest])


def num_chunks(size_bytes: int, chunk_bytes: int = STATE_CHUNK_BYTES) -> int:
    return -(-size_bytes // chunk_bytes)


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves]
    if not level:
        return hashlib.sha256(b"").digest()
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def state_digest(anchor_chunks: Sequence[bytes], momentum_chunks: Sequence[bytes]) -> bytes:
    """The root over the two subtrees of a state: its anchor and its outer momentum."""
    return join_subtrees(merkle_root(anchor_chunks), merkle_root(momentum_chunks))


def join_subtrees(anchor_root: bytes, momentum_root: bytes) -> bytes:
    """The state digest of an anchor and an outer momentum that have these Merkle roots."""
    return hashlib.sha256(b"\x01" + anchor_root + momentum_root).digest()


def over_shards(digests: Sequence[bytes]) -> bytes:
    """One digest for those of all shards, in order: of one shard its own."""
    return digests[0] if len(digests) == 1 else merkle_root(digests)


def log_genesis(run_id: bytes, shard: int) -> bytes:
    """The log digest of a shard before its first commit."""
    return hashlib.sha256(b"swarm.v1 log" + run_id + shard.to_bytes(4, "big")).digest()


def extend_log(log_digest: bytes, record: bytes) -> bytes:
    """The log digest after ``record`` (serialised) is appended."""
    return hashlib.sha256(log_digest + sha256(record)).digest()
