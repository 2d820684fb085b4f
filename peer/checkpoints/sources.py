"""Where the chunks of a checkpoint come from: peers, mirrors and the coordinator, all asked alike and at once.

Decides how one chunk is taken from one source: in pieces, each within a time, not much slower than others can, no
faster than the person allows, kept on disk until the chunk is whole. Leaves whom to ask for which chunk to
`peer.p2p.fetch`, mirrors to `peer.checkpoints.mirrors`, and where chunks lie to `peer.checkpoints.filling`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from peer.checkpoints.pieces import Part, Pieces
from peer.coordinator_client import CoordinatorClient
from peer.p2p.chunk_store import CHUNK_METHOD, REPLY_OVERHEAD_BYTES
from peer.p2p.fetch import Brought, FetchLimits, HolderBook, Wanted, reply_data
from peer.p2p.transport import Transport
from swarm.errors import Busy, DeadlineExceeded, DigestError, NetworkError, ProtocolError
from swarm.identity import peer_id_of
from swarm.proto.round_pb2 import ChunkRequest

# What one question brings, of sources that do not hand it over as it comes. A killed download loses half of it per
# chunk under way; smaller ones cost round trips.
PIECE_BYTES = 512 << 10
PIECE_TIMEOUT_S = 60.0
CHUNK_TIMEOUT_S = 600.0
# A source is too slow for a chunk when it had this time, and others bring so many times as much.
PATIENCE_S = 5.0
SLOWER_TIMES = 8
LIMITS = FetchLimits(per_holder=6, total=8)
# The coordinator answers few at once, of all who ask: one download alone must not take all of its places.
COORDINATOR_PLACES = 3
BUSY_PAUSE_S = 0.5
BUSY_ANSWERS = 20  # to one question, before others are asked

PEER, MIRROR, COORDINATOR = "peers", "mirrors", "coordinator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """``length`` bytes with this digest: those of ``file`` from ``offset`` on."""

    digest: bytes
    file: str
    offset: int
    length: int


class Source(Protocol):
    """Somebody who may hold the checkpoint. ``kind`` is what people are told, ``name`` tells it from others."""

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    def read(self, chunk: Chunk, start: int) -> AsyncIterator[bytes]:
        """The bytes of ``chunk`` from ``start`` on, in pieces.

        Raises `NotFound` where the source lacks them, another `NetworkError` where it fails.
        """
        ...


@dataclass(frozen=True, slots=True)
class PeerSource:
    """A peer of the run, over libp2p."""

    transport: Transport
    public_key: bytes
    kind: str = PEER

    @property
    def name(self) -> str:
        return peer_id_of(self.public_key)

    async def read(self, chunk: Chunk, start: int) -> AsyncIterator[bytes]:
        length = chunk.length - start
        request = ChunkRequest(digest=chunk.digest, offset=start, length=length)
        reply = self.transport.stream(
            self.public_key,
            CHUNK_METHOD,
            request.SerializeToString(),
            timeout_s=CHUNK_TIMEOUT_S,
            max_response_bytes=length + REPLY_OVERHEAD_BYTES,
        )
        async with aclosing(reply), aclosing(reply_data(reply, length)) as pieces:
            async for piece in pieces:
                yield piece


@dataclass(frozen=True, slots=True)
class CoordinatorSource:
    """The coordinator, over gRPC: for whoever reaches no peer. Where it is busy it is asked again for a while."""

    client: CoordinatorClient
    kind: str = COORDINATOR
    name: str = COORDINATOR
    busy_pause_s: float = BUSY_PAUSE_S
    _places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(COORDINATOR_PLACES), compare=False)

    async def read(self, chunk: Chunk, start: int) -> AsyncIterator[bytes]:
        for offset, length in _spans(start, chunk.length):
            yield _whole(await self._piece(chunk.digest, offset, length), length)

    async def _piece(self, digest: bytes, offset: int, length: int) -> bytes:
        async with self._places:
            for _ in range(BUSY_ANSWERS - 1):
                try:
                    return await self.client.chunk(digest, offset, length)
                except Busy:
                    # Spread, so that those who were turned away together do not come back together.
                    await asyncio.sleep(self.busy_pause_s * random.uniform(0.5, 1.5))
            return await self.client.chunk(digest, offset, length)


def _whole(piece: bytes, length: int) -> bytes:
    """``piece``, which must not come drop by drop, each with its own question."""
    if len(piece) != length:
        raise ProtocolError(f"{len(piece)} bytes of a chunk instead of {length}")
    return piece


def _spans(start: int, end: int) -> list[tuple[int, int]]:
    return [(offset, min(PIECE_BYTES, end - offset)) for offset in range(start, end, PIECE_BYTES)]


OnProgress = Callable[[int, int], object]
"""(bytes verified on disk, bytes in all)"""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a download brought, for the person who waits: ``received_bytes`` by source, also what was dropped."""

    on_progress: OnProgress = lambda done, total: None
    received_bytes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    copied_bytes: int = 0
    chunks_fetched: int = 0

    def received(self, source: Source, num_bytes: int) -> None:
        self.kinds[source.name] = source.kind
        self.received_bytes[source.name] = self.received_bytes.get(source.name, 0) + num_bytes

    def by_kind(self) -> dict[str, int]:
        """Bytes received from peers, mirrors and the coordinator."""
        found: dict[str, int] = {}
        for name, count in self.received_bytes.items():
            found[self.kinds[name]] = found.get(self.kinds[name], 0) + count
        return found

    def as_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        sources = [
            {"kind": self.kinds[name], "name": name, "received_bytes": count}
            for name, count in sorted(self.received_bytes.items())
        ]
        return {"sources": sources, "copied_bytes": self.copied_bytes, "chunks_fetched": self.chunks_fetched}


class Pace:
    """At most ``bytes_per_s`` on average, over all sources together; None: as fast as it goes."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def spend(self, num_bytes: int) -> None:
        """Wait until what came before ``num_bytes`` is paid for."""
        if self._bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        wait_s = max(0.0, self._free_at - now)
        self._free_at = now + wait_s + num_bytes / self._bytes_per_s
        await asyncio.sleep(self._free_at - now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """Takes chunks from ``sources``; `ask` is what `peer.p2p.fetch.fetch_from` calls."""

    sources: Mapping[bytes, Source]
    chunks: Mapping[bytes, Chunk]
    pieces: Pieces
    pace: Pace
    tally: Tally
    book: HolderBook

    async def ask(self, holder: bytes, item: Wanted) -> Brought:
        """A whole chunk from this holder, going on where an earlier one stopped."""
        source, chunk = self.sources[holder], self.chunks[item.digest]
        part = await asyncio.to_thread(self.pieces.open, chunk.digest, chunk.length)
        received, spent_s = await self._complete(part, chunk, holder, source)
        data = await asyncio.to_thread(part.whole, chunk.digest)
        if data is None and part.senders - {source.name}:
            # Somebody's bytes are wrong, and nobody can say whose: all of it again, from this source alone.
            part.discard()
            received, spent_s = await self._complete(part, chunk, holder, source)
            data = await asyncio.to_thread(part.whole, chunk.digest)
        if data is None:
            part.discard()
            raise DigestError(f"{source.name} sent bytes that do not match {chunk.digest.hex()[:16]}")
        return Brought(data, received, spent_s)

    async def _complete(self, part: Part, chunk: Chunk, holder: bytes, source: Source) -> tuple[int, float]:
        """Bytes that came, and the seconds that this source took for them: not what pacing and our disk took."""
        clock = asyncio.get_running_loop().time
        spent_s, here = 0.0, 0
        async with aclosing(source.read(chunk, len(part.data))) as pieces:  # type: ignore[type-var]
            while len(part.data) < chunk.length:
                asked = clock()
                piece = await _next(pieces)
                spent_s += clock() - asked
                here += len(piece)
                self.tally.received(source, len(piece))
                if not piece or len(part.data) + len(piece) > chunk.length:
                    raise ProtocolError(f"{source.name} sent {len(piece)} bytes where others were due")
                part.append(piece, source.name)
                await self.pace.spend(len(piece))
                if len(part.data) < chunk.length and self._is_slow(holder, here, spent_s):
                    raise DeadlineExceeded(f"{source.name} is too slow")
        return here, spent_s

    def _is_slow(self, holder: bytes, num_bytes: int, seconds: float) -> bool:
        if seconds > CHUNK_TIMEOUT_S:
            return True
        others = [self.book.record(other).bytes_per_s for other in self.sources if other != holder]
        return seconds > PATIENCE_S and num_bytes / seconds * SLOWER_TIMES < max(others, default=0.0)


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    """The next piece. `asyncio.wait_for` would lose a cancellation that comes together with it (until Python 3.12)."""
    waiter = asyncio.ensure_future(anext(pieces))
    try:
        done, _ = await asyncio.wait({waiter}, timeout=PIECE_TIMEOUT_S)
    finally:
        if not waiter.done():
            waiter.cancel()
            await asyncio.wait({waiter})  # a generator that still runs cannot be closed
    if not done:
        raise DeadlineExceeded(f"nothing came for {PIECE_TIMEOUT_S:.0f} s")
    try:
        return waiter.result()
    except StopAsyncIteration as error:
        raise NetworkError("the bytes ended too early") from error


def by_key(sources: Sequence[Source]) -> dict[bytes, Source]:
    """Sources under the keys that a `HolderBook` knows them by."""
    return {source.name.encode(): source for source in sources}
