"""Checkpoints as they come: assembled from the shared state at the rounds that the spec names, served, published.

Every replica assembles the same files from the same bytes, serves their chunks, and attests to the coordinator what
state they are of. A seed peer also hands over the manifest, which the coordinator signs once enough replicas attested
the same. A coordinator that is away, or waits for others, is asked again: the files wait on disk.
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
from peer.p2p.chunk_store import ChunkStore
from peer.rounds.codec import Float32
from peer.rounds.shard import Shard
from peer.training.layout import Layout
from swarm import manifest as manifests
from swarm.errors import NetworkError, NotAdmitted, NotFound, SwarmError
from swarm.file_ranges import FileChunks
from swarm.files import write_durably
from swarm.log import LogHead
from swarm.proto.checkpoint_pb2 import Attestation
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication
from swarm.witness import attestation_of

RETRY_S = 1.0
MAX_WAITING = 3

log = logging.getLogger(__name__)


class Coordinator(Protocol):
    async def attest(self, attestation: Attestation) -> None: ...
    async def publish(self, manifest_bytes: bytes) -> Publication: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What all checkpoints of a run share. ``publishes``: not on volunteers; ``kept`` folders stay on disk."""

    folder: Path
    parts: CheckpointParts
    layout: Layout
    signed_spec: Signed
    coordinator: Coordinator
    publishes: bool
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCopy:
    head: LogHead
    state_digest: bytes
    momentum_digest: bytes
    anchor: Float32

    @classmethod
    def of(cls, shard: Shard, head: LogHead, folder: Path) -> StateCopy:
        """A copy on disk in ``folder`` of what ``shard`` holds after ``head``. Blocks."""
        return cls(
            head=head,
            state_digest=shard.state_digest,
            momentum_digest=shard.momentum_digest,
            anchor=shard.anchor_on_disk(folder),
        )


@dataclass(slots=True, kw_only=True)
class _Untold:
    """A checkpoint on disk that the coordinator has not taken yet."""

    round: int
    folder: Path
    payload: bytes
    attested: bool = False


class CheckpointMaker:
    def __init__(self, template: Template, chunks: ChunkStore, on_ready: Callable[[int], None]) -> None:
        """``on_ready`` is told the round whose checkpoint this peer now serves (and, on a seed peer, published)."""
        self._template, self._chunks, self._on_ready = template, chunks, on_ready
        self._waiting: asyncio.Queue[StateCopy] = asyncio.Queue(MAX_WAITING)
        self._served: list[tuple[int, FileChunks]] = []
        self._untold: list[_Untold] = []

    def resume(self, run_id: bytes, publication_key: bytes) -> int:
        """Serve the checkpoints that lie here from before; the newest's round (0: none).

        A whole one that the coordinator may not have taken yet is told now; one that was not finished goes away.
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
                self._untold.append(_Untold(round=manifest.round, folder=folder, payload=payload))
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
        """Make what is offered and tell what is made, each in its order, until cancelled."""
        await asyncio.gather(self._make_all(), self._tell_all())

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
            momentum_digest=state.momentum_digest,
            log_digest=state.head.log_digest,
            tensors=template.layout.views(state.anchor),
        )
        manifest = await asyncio.to_thread(assemble, folder, parts)
        attestation_of(manifest)  # what lies on disk is what the log names, or nobody is told of it
        payload = manifest.canonical_bytes()
        await asyncio.to_thread(write_durably, folder / manifests.MANIFEST_FILE, payload)
        self._serve(number, FileChunks(folder, manifest))
        self._untold.append(_Untold(round=number, folder=folder, payload=payload))
        if not template.publishes:
            self._on_ready(number)

    async def _tell_all(self) -> None:
        """Until the coordinator takes each: it may be away, lack the round's commit, or wait for other witnesses."""
        while True:
            for item in list(self._untold):
                try:
                    await self._tell(item)
                except NotFound as error:
                    log.info("round %d: not published yet: %s", item.round, error)
                    if item.folder.exists():
                        continue
                except (NetworkError, NotAdmitted) as error:
                    log.info("round %d: the coordinator was not told: %s", item.round, error)
                    break
                except SwarmError as error:
                    log.warning("round %d: not published: %s", item.round, error)
                self._untold.remove(item)
            await asyncio.sleep(RETRY_S)

    async def _tell(self, item: _Untold) -> None:
        template = self._template
        if not item.attested:
            await template.coordinator.attest(attestation_of(manifests.parse(item.payload)))
            item.attested = True
        if template.publishes:
            publication = await template.coordinator.publish(item.payload)
            await asyncio.to_thread(write_signed, item.folder, publication, template.signed_spec)
            self._on_ready(item.round)

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
