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

from peer.checkpoints.checkpoint import CheckpointParts, ShardParts, assemble, write_signed
from peer.checkpoints.recording import add_record
from peer.p2p.chunk_store import ChunkStore
from peer.rounds.archive import forget_momentum
from peer.rounds.codec import Float32
from peer.training.layout import Layout
from swarm import manifest as manifests
from swarm.checkpoint_chunks import FileChunks
from swarm.errors import NetworkError, NotAdmitted, NotFound, SwarmError
from swarm.files import write_durably
from swarm.proto.checkpoint_pb2 import Attestation
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication, published_manifest
from swarm.run_spec import RunSpec
from swarm.witness import attestations_of

RETRY_S = 1.0
MAX_WAITING = 3

log = logging.getLogger(__name__)


class Coordinator(Protocol):
    async def attest(self, attestation: Attestation) -> None: ...
    async def publish(self, manifest_bytes: bytes) -> Publication: ...
    async def run_record(self, round_number: int) -> bytes: ...


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
    """``states``: of every shard after ``round``; ``anchor``: of all of them, one after the other."""

    round: int
    total_tokens: int
    states: tuple[ShardParts, ...]
    anchor: Float32


@dataclass(slots=True, kw_only=True)
class _Untold:
    """A checkpoint on disk that the coordinator has not taken yet."""

    round: int
    folder: Path
    payload: bytes
    attested: bool = False
    completed: bool = False


class CheckpointMaker:
    def __init__(self, template: Template, chunks: ChunkStore, on_ready: Callable[[int], None]) -> None:
        """``on_ready`` is told the round whose checkpoint this peer now serves (and, on a seed peer, published)."""
        self._template, self._chunks, self._on_ready = template, chunks, on_ready
        self._waiting: asyncio.Queue[StateCopy] = asyncio.Queue(MAX_WAITING)
        self._served: list[tuple[int, FileChunks]] = []
        self._untold: list[_Untold] = []

    def resume(self, run_id: bytes) -> int:
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
            if not _is_signed(folder, run_id, self._template.parts.spec):
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
            log.warning("round %d: no checkpoint, %d others wait", state.round, MAX_WAITING)

    async def run(self) -> None:
        """Make what is offered and tell what is made, each in its order, until cancelled."""
        await asyncio.gather(self._make_all(), self._tell_all())

    async def _make_all(self) -> None:
        while True:
            state = await self._waiting.get()
            try:
                await self._make(state)
            except SwarmError as error:
                log.warning("round %d: no checkpoint: %s", state.round, error)

    async def _make(self, state: StateCopy) -> None:
        """On disk at once: while the coordinator is away, files wait there and no state waits in memory."""
        template, number = self._template, state.round
        folder = template.folder / f"checkpoint-{number}"
        parts = replace(
            template.parts,
            round=number,
            total_tokens=state.total_tokens,
            states=state.states,
            tensors=template.layout.views(state.anchor),
        )
        manifest = await asyncio.to_thread(assemble, folder, parts)
        attestations_of(manifest)  # what lies on disk is what the log names, or nobody is told of it
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
                except OSError as error:
                    log.warning("round %d: its files cannot be read or written: %s", item.round, error)
                    if item.folder.exists():
                        continue
                self._untold.remove(item)
            await asyncio.sleep(RETRY_S)

    async def _tell(self, item: _Untold) -> None:
        template = self._template
        if not item.attested:
            for attestation in attestations_of(manifests.parse(item.payload)):
                await template.coordinator.attest(attestation)
            item.attested = True
        if template.publishes and item.folder.exists():  # newer ones may have taken its place on disk meanwhile
            if not item.completed:
                await self._complete_card(item)
                item.completed = True
            publication = await template.coordinator.publish(item.payload)
            await asyncio.to_thread(write_signed, item.folder, publication, template.signed_spec)
            self._on_ready(item.round)

    async def _complete_card(self, item: _Untold) -> None:
        """Let the card tell what the coordinator knows, and serve the files that this changes."""
        raw = await self._template.coordinator.run_record(item.round)
        manifest = manifests.parse(item.payload)
        completed = await asyncio.to_thread(add_record, item.folder, self._template.parts, manifest, raw)
        if completed == manifest:
            return
        item.payload = completed.canonical_bytes()
        for place, (number, source) in enumerate(self._served):
            if number == item.round:
                self._chunks.remove_source(source)
                self._served[place] = (number, FileChunks(item.folder, completed))
                self._chunks.add_source(self._served[place][1])

    def _serve(self, round_number: int, chunks: FileChunks) -> None:
        self._chunks.add_source(chunks)
        self._served.append((round_number, chunks))
        while len(self._served) > self._template.kept:
            old, source = self._served.pop(0)
            self._chunks.remove_source(source)
            shutil.rmtree(self._template.folder / f"checkpoint-{old}", ignore_errors=True)
            forget_momentum(self._template.folder, old, self._template.parts.spec.num_shards)


def _is_signed(folder: Path, run_id: bytes, spec: RunSpec) -> bool:
    try:
        published_manifest(folder, run_id, spec)
    except (OSError, SwarmError):
        return False
    return True


def _round_of(served: tuple[int, FileChunks]) -> int:
    return served[0]
