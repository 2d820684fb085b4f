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

from peer.checkpoint import CheckpointParts, assemble, write_signed
from peer.chunk_store import ChunkStore, FileChunks
from peer.codec import Float32
from peer.layout import Layout
from swarm import manifest as manifests
from swarm.errors import NetworkError, SwarmError
from swarm.log import LogHead
from swarm.proto.common_pb2 import Signed

RETRY_S = 2.0
MAX_WAITING = 16

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

    def resume(self, run_id: bytes, publication_key: bytes) -> int:
        """Serve the published checkpoints that lie here from before; the newest's round (0: none).

        Folders that were never published go away: they are made again when their round is offered again.
        """
        for folder in self._template.folder.glob("checkpoint-*"):
            try:
                signed = Signed.FromString((folder / manifests.SIGNATURE_FILE).read_bytes())
                manifest = manifests.parse_signed(signed, run_id, publication_key)
            except (OSError, DecodeError, SwarmError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self._served.append((manifest.round, FileChunks(folder, manifest)))
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
        """Make what is offered, one after another, until cancelled."""
        while True:
            state = await self._waiting.get()
            try:
                await self._make(state)
            except SwarmError as error:
                log.warning("round %d: no checkpoint: %s", state.head.round, error)

    async def _make(self, state: StateCopy) -> None:
        template = self._template
        folder = template.folder / f"checkpoint-{state.head.round}"
        parts = replace(
            template.parts,
            round=state.head.round,
            total_tokens=state.head.total_tokens,
            state_digest=state.state_digest,
            log_digest=state.head.log_digest,
            tensors=template.layout.views(state.anchor),
        )
        manifest = await asyncio.to_thread(assemble, folder, parts)
        self._serve(state.head.round, FileChunks(folder, manifest))
        if template.publisher is not None:
            signed = await self._publish(template.publisher, manifest.canonical_bytes(), state.head.round)
            await asyncio.to_thread(write_signed, folder, signed, template.signed_spec)
        self._on_ready(state.head.round)

    def _serve(self, round_number: int, chunks: FileChunks) -> None:
        self._chunks.add_source(chunks)
        self._served.append((round_number, chunks))
        while len(self._served) > self._template.kept:
            old, source = self._served.pop(0)
            self._chunks.remove_source(source)
            shutil.rmtree(self._template.folder / f"checkpoint-{old}", ignore_errors=True)

    async def _publish(self, publisher: Publisher, manifest_bytes: bytes, round_number: int) -> Signed:
        """Until the coordinator takes it: it may be away, or not have recorded the round yet."""
        while True:
            try:
                return await publisher.publish(manifest_bytes)
            except NetworkError as error:
                log.info("round %d: not published yet: %s", round_number, error)
            await asyncio.sleep(RETRY_S)


def _round_of(served: tuple[int, FileChunks]) -> int:
    return served[0]
