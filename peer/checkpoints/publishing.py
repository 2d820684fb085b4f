"""Checkpoints as they come: assembled from the shared state at the rounds that the spec names, served, published.

Every replica assembles the same files from the same bytes and serves their chunks; a seed peer also hands the manifest
to the coordinator, which signs it. A coordinator that is away is asked again: the files wait on disk.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from peer.checkpoints.checkpoint import CheckpointParts, assemble, write_signed
from peer.p2p.chunk_store import ChunkStore, FileChunks
from peer.rounds.codec import Float32
from peer.training.layout import Layout
from swarm import manifest as manifests
from swarm.errors import NetworkError, SwarmError
from swarm.files import write_durably
from swarm.log import LogHead
from swarm.proto.common_pb2 import Signed

RETRY_S = 1.0
MAX_WAITING = 3

log = logging.getLogger(__name__)


class Publisher(Protocol):
    async def publish(self, manifest_bytes: bytes) -> Signed: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What all checkpoints of a run share. ``publisher`` is None on volunteers; ``kept`` folders stay on disk."""

    folder: Path
    parts: CheckpointParts
    layout: Layout
    signed_spec: Signed
    publisher: Publisher | None
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCopy:
    head: LogHead
    state_digest: bytes
    anchor: Float32


class CheckpointMaker:
    def __init__(self, template: Template, chunks: ChunkStore, on_ready: Callable[[int], None]) -> None:
        """``on_ready`` is told the round whose checkpoint this peer now serves (and, on a seed peer, published)."""
        self._template, self._chunks, self._on_ready = template, chunks, on_ready
        self._waiting: asyncio.Queue[StateCopy] = asyncio.Queue(MAX_WAITING)
        self._served: list[tuple[int, FileChunks]] = []
        self._unpublished: list[tuple[int, Path, bytes]] = []

    def resume(self, run_id: bytes, publication_key: bytes) -> int:
        """Serve the checkpoints that lie here from before; the newest's round (0: none).

        A whole one that was not published yet is published now; one that was not finished goes away.
        """
        for folder in sorted(self._template.folder.glob("checkpoint-*")):
            try:
                payload = (folder / manifests.MANIFEST_FILE).read_bytes()
                manifest = manifests.parse(payload)
            except (FileNotFoundError, SwarmError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self._served.append((manifest.round, FileChunks(folder, manifest)))
            if not _is_signed(folder, run_id, publication_key):
                self._unpublished.append((manifest.round, folder, payload))
        self._served.sort(key=_round_of)
        for _, chunks in self._served:
            self._chunks.add_source(chunks)
        return max((number for number, _ in self._served), default=0)

    def offer(self, state: StateCopy) -> None:
        """Make a checkpoint of this state in the background; where too many wait already, this one is left out."""
        try:
            self._waiting.put_nowait(state)
        except asyncio.QueueFull:
            log.warning("round %d: no checkpoint, %d others wait", state.head.round, MAX_WAITING)

    async def run(self) -> None:
        """Make what is offered and publish what is made, each in its order, until cancelled."""
        await asyncio.gather(self._make_all(), self._publish_all())

    async def _make_all(self) -> None:
        while True:
            state = await self._waiting.get()
            try:
                await self._make(state)
            except SwarmError as error:
                log.warning("round %d: no checkpoint: %s", state.head.round, error)

    async def _make(self, state: StateCopy) -> None:
        """On disk at once: while the coordinator is away, files wait there and no state waits in memory."""
        template, number = self._template, state.head.round
        folder = template.folder / f"checkpoint-{number}"
        parts = replace(
            template.parts,
            round=number,
            total_tokens=state.head.total_tokens,
            state_digest=state.state_digest,
            log_digest=state.head.log_digest,
            tensors=template.layout.views(state.anchor),
        )
        manifest = await asyncio.to_thread(assemble, folder, parts)
        payload = manifest.canonical_bytes()
        await asyncio.to_thread(write_durably, folder / manifests.MANIFEST_FILE, payload)
        self._serve(number, FileChunks(folder, manifest))
        if template.publisher is None:
            self._on_ready(number)
        else:
            self._unpublished.append((number, folder, payload))

    async def _publish_all(self) -> None:
        """Until the coordinator takes each: it may be away, or not have recorded the round yet."""
        publisher = self._template.publisher
        while publisher is not None:
            for item in list(self._unpublished):
                number, folder, payload = item
                try:
                    signed = await publisher.publish(payload)
                    await asyncio.to_thread(write_signed, folder, signed, self._template.signed_spec)
                except NetworkError as error:
                    log.info("round %d: not published yet: %s", number, error)
                    break
                except SwarmError as error:
                    log.warning("round %d: not published: %s", number, error)
                else:
                    self._on_ready(number)
                self._unpublished.remove(item)
            await asyncio.sleep(RETRY_S)

    def _serve(self, round_number: int, chunks: FileChunks) -> None:
        self._chunks.add_source(chunks)
        self._served.append((round_number, chunks))
        while len(self._served) > self._template.kept:
            old, source = self._served.pop(0)
            self._chunks.remove_source(source)
            shutil.rmtree(self._template.folder / f"checkpoint-{old}", ignore_errors=True)


def _is_signed(folder: Path, run_id: bytes, publication_key: bytes) -> bool:
    try:
        signed = Signed.FromString((folder / manifests.SIGNATURE_FILE).read_bytes())
        manifests.parse_signed(signed, run_id, publication_key)
    except (OSError, DecodeError, SwarmError):
        return False
    return True


def _round_of(served: tuple[int, FileChunks]) -> int:
    return served[0]
