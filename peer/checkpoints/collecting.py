"""An archive brought together from a run's seed peers, for an auditor who has none.

Decides what is fetched (of every shard the log up to the audited round, the averages that are re-applied, and the state
of round 0, or the momentum after the checkpoint that an audit starts from), in which order, and that it lies as a seed
peer's own folder does, so that a second audit fetches only what is new. Believes nothing: the log proves itself from
the signed genesis, everything else has its digest there or in a signed manifest. What nobody has any more is left out,
for the audit to tell. Leaves re-applying it to `peer.checkpoints.audit`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer.p2p.chunk_store import MAX_BLOB_BYTES, ChunkStore
from peer.p2p.fetch import FetchLimits, HolderBook, Wanted, fetch_many
from peer.p2p.transport import Transport
from peer.rounds.archive import Archive, keep_genesis, momentum_path
from peer.rounds.catch_up import Newcomer, extend_log, fetch_first_state, fetch_momentum
from peer.rounds.ledger import Ledger, LedgerOptions
from swarm import log as logs
from swarm.digest import chunk_digests, merkle_root
from swarm.errors import DiskFull, NetworkError, NotFound, ProtocolError, SwarmError, VerificationError
from swarm.files import disk_errors, write_durably
from swarm.log import parse_record
from swarm.manifest import CheckpointManifest
from swarm.proto.common_pb2 import Genesis, Signed
from swarm.run_spec import RunSpec

ROUNDS_AT_ONCE = 4
_GROUP = "audit"

OnRound = Callable[[], object]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Whom to ask (``holders``, by their public keys), and what the organizer signed about the run."""

    transport: Transport
    holders: Sequence[bytes]
    spec: RunSpec
    genesis: Genesis
    signed_genesis: Signed


async def collect(
    sources: Sources,
    folder: Path,
    last_round: int,
    start: CheckpointManifest | None = None,
    on_round: OnRound = lambda: None,
) -> Archive:
    """Bring what an audit up to ``last_round`` reads into ``folder``; ``on_round`` hears of each round of each shard.

    ``start``: the checkpoint that the audit starts from; None: the genesis. What lies there from before is kept. Raises
    `NotFound` where nobody has the log that far, or what there is to start from, `VerificationError` where
    ``folder`` holds another branch's log, `DiskFull`.
    """
    with disk_errors(folder):
        chunks = await asyncio.to_thread(_open, folder, sources.signed_genesis)
        for shard in range(sources.spec.num_shards):
            newcomer = _newcomer(sources, folder, chunks, shard)
            await _collect_log(newcomer, sources.holders, last_round)
            first_round = 1 + (start.round if start is not None else 0)
            wanted = {number: _parts_of(newcomer.ledger, number) for number in range(first_round, last_round + 1)}
            _check_room(folder, [item for items in wanted.values() for item in items if not chunks.has(item.digest)])
            await _collect_start(newcomer, folder, start, sources.holders)
            await _collect_averages(newcomer, sources.holders, wanted, on_round)
    return Archive(folder, sources.spec)


def _open(folder: Path, signed_genesis: Signed) -> ChunkStore:
    """The store of everything that is fetched. It throws nothing away: room is looked at before."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_genesis(folder, signed_genesis)
    return ChunkStore(folder / "chunks", 1 << 62)


def _newcomer(sources: Sources, folder: Path, chunks: ChunkStore, shard: int) -> Newcomer:
    head, about = logs.genesis_head(sources.genesis, shard), sources.genesis.shards[shard]
    return Newcomer(
        transport=sources.transport,
        ledger=Ledger(folder / f"shard-{shard}", head, chunks, LedgerOptions(archive=True)),
        chunks=chunks,
        spec=sources.spec,
        shard=shard,
        genesis_digest=about.state_digest,
        num_values=about.num_values,
        book=HolderBook(random.Random(shard)),
    )


async def _collect_log(newcomer: Newcomer, holders: Sequence[bytes], last_round: int) -> None:
    failure: SwarmError | None = None
    for holder in holders:
        if newcomer.ledger.head.round >= last_round:
            return
        try:
            await extend_log(newcomer, holder)
        except (NetworkError, VerificationError) as error:
            log.info("shard %d: a seed peer's log is of no use: %s", newcomer.shard, error)
            failure = error
    if newcomer.ledger.head.round < last_round:
        raise NotFound(
            f"the log of shard {newcomer.shard} can be had up to round {newcomer.ledger.head.round} only"
            f" ({failure or 'nobody has more'})",
            "try again later; where the run changed branches, remove what was fetched before: audits/RUN_ID",
        )


async def _collect_start(
    newcomer: Newcomer, folder: Path, start: CheckpointManifest | None, holders: Sequence[bytes]
) -> None:
    if start is None:
        if newcomer.ledger.read_state(0, newcomer.num_values) is None:
            newcomer.ledger.save_state(0, await fetch_first_state(newcomer, holders))
        return
    path, root = momentum_path(folder, start.round, newcomer.shard), start.states[newcomer.shard].momentum_digest
    if path.exists() and merkle_root(chunk_digests(memoryview(path.read_bytes()))).hex() == root:
        return
    write_durably(path, await fetch_momentum(newcomer, start.round, bytes.fromhex(root), holders))


def _parts_of(ledger: Ledger, number: int) -> list[Wanted]:
    (commit,) = ledger.commits(number, 1)
    parts = [part for part in parse_record(commit.record, ledger.heads[number - 1]).parts if part.digest]
    if any(part.size_bytes > MAX_BLOB_BYTES for part in parts):
        raise ProtocolError(f"round {number}: an average is larger than any may be")
    return [Wanted(part.digest, part.size_bytes) for part in parts]


def _check_room(folder: Path, missing: Iterable[Wanted]) -> None:
    needed_bytes = sum(item.size_bytes for item in missing)
    if needed_bytes > shutil.disk_usage(folder).free:
        raise DiskFull(
            f"the averages that an audit re-applies take {needed_bytes / 1e9:.1f} GB more than {folder} has room for",
            "let XDG_DATA_HOME name a folder on a larger disk",
        )


async def _collect_averages(
    newcomer: Newcomer, holders: Sequence[bytes], wanted: Mapping[int, Sequence[Wanted]], on_round: OnRound
) -> None:
    chunks, room = newcomer.chunks, asyncio.Semaphore(ROUNDS_AT_ONCE)

    async def keep(_: Wanted, data: bytes) -> None:
        await chunks.keep(data)

    async def collect_round(number: int, items: Sequence[Wanted]) -> None:
        missing = [item for item in items if not chunks.has(item.digest)]
        chunks.pin(_GROUP, [item.digest for item in items])
        async with room:
            try:
                await fetch_many(newcomer.transport, missing, holders, keep, FetchLimits(), newcomer.book)
            except (NotFound, VerificationError) as error:
                log.info("round %d: an average cannot be had: %s", number, error)
        on_round()

    await asyncio.gather(*(collect_round(number, items) for number, items in wanted.items()))
