"""Joining a run: from an invite to everything that a peer needs before it asks for states.

Order matters: the pin and the signed rules first, then what fits into this machine, then the network, then admission.
Leaves the state to begin from to `peer.starting`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from peer import placing, token_mirror
from peer.checkpoints.checkpoint import CheckpointParts
from peer.checkpoints.publishing import Template
from peer.coordinator_client import CoordinatorClient, RunInfo
from peer.home import Home
from peer.p2p.chunk_store import ChunkStore, token_shard_source
from peer.p2p.fetch import HolderBook
from peer.p2p.lasting_transport import LastingTransport
from peer.p2p.network import Network, NetworkConfig, open_network
from peer.p2p.spill import Spill
from peer.rounds.archive import keep_genesis
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.statuses import StatusRules, check_admission, read_statuses, status_key
from peer.training.hosting import Hosting, choose_hosting
from peer.training.speed import try_flops
from peer.training.trainer import Limits
from swarm import data_manifest, log, schedule
from swarm.data_manifest import DataManifest
from swarm.errors import NetworkError, Unreachable
from swarm.identity import Identity, read_signed
from swarm.invite import Invite
from swarm.proto.common_pb2 import Signed

STATUS_LIFETIME_INTERVALS = 6
MIN_STATUS_LIFETIME_S = 10.0
SEED_WAIT_ATTEMPTS = 40
MAX_TOLD_ADDRESSES = 8
RETRY_S = 1.5
USUAL_UPLOAD_BPS = 20_000_000
DEFAULT_DISK_BYTES = 50 << 30
KEPT_BY_VOLUNTEER, KEPT_BY_SEED = 1, 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """What a person chose.

    ``data_folder`` makes a seed peer: it serves these token shards and does not train. ``mirrors`` makes one that
    fetches what it serves.
    """

    invite: Invite
    home: Home
    data_folder: Path | None = None
    mirrors: bool = False
    device: str = "auto"
    memory_bytes: int | None = None
    """the most that training may take of the device's memory; None: what is free"""
    limits: Limits = field(default_factory=Limits)
    disk_bytes: int = DEFAULT_DISK_BYTES
    upload_limit_bps: int | None = None
    """bits per second that may be sent; None: what the line gives"""
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce: tuple[str, ...] = ()
    name: str = ""
    """under which the volunteer wants to be named on model cards; none: not at all"""

    @property
    def trains(self) -> bool:
        return self.data_folder is None and not self.mirrors

    @property
    def first_upload_bps(self) -> int:
        """What this peer says of its uplink until it has measured it."""
        return self.upload_limit_bps or USUAL_UPLOAD_BPS


@dataclass(slots=True)
class Papers:
    """The newest admission: what other peers want to see."""

    admission: Signed | None = None

    def show(self) -> bytes:
        return self.admission.SerializeToString() if self.admission is not None else b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A verified run, an open network, and a place on disk."""

    options: PeerOptions
    identity: Identity
    client: CoordinatorClient
    run: RunInfo
    manifest: DataManifest
    clock: Callable[[], float]
    transport: LastingTransport
    papers: Papers
    folder: Path
    chunks: ChunkStore
    ledgers: tuple[Ledger, ...]
    """of every shard that is hosted here, in order"""
    book: HolderBook
    hosting: Hosting | None = None
    """what is trained here; None on a seed peer"""
    reason: str = ""
    """why this span of all that fit"""

    @property
    def founders(self) -> tuple[bytes, ...]:
        return tuple(self.run.genesis.voters)

    def is_checkpoint_round(self, number: int) -> bool:
        """At the run's cadence, and when the run ends, as the log of the first shard that is hosted here says."""
        log_of_first = self.ledgers[0]
        total_tokens = log_of_first.heads[number].total_tokens if number <= log_of_first.head.round else 0
        return number > 0 and schedule.is_checkpoint_round(self.run.spec, number, total_tokens)

    @property
    def status_rules(self) -> StatusRules:
        return status_rules(self.run)


def status_rules(run: RunInfo) -> StatusRules:
    return StatusRules(
        run_id=run.spec.run_id,
        publication_key=bytes.fromhex(run.spec.publication_key),
        founders=tuple(run.genesis.voters),
        lifetime_s=max(MIN_STATUS_LIFETIME_S, STATUS_LIFETIME_INTERVALS * run.spec.rounds.status_interval_s),
    )


def checkpoint_template(joined: Joined) -> Template:
    """What all checkpoints of the run have in common."""
    from peer.training import model

    run = joined.run
    config = model.build_config(run.spec, joined.manifest.vocab_size)
    layout = model.build_layout(config)
    return Template(
        folder=joined.folder,
        parts=CheckpointParts(
            run_id=run.spec.run_id,
            spec=run.spec,
            data=joined.manifest,
            data_json=run.manifest_bytes,
            round=1,
            total_tokens=0,
            states=(),
            config_json=model.config_json(config),
            tokenizer_json=run.tokenizer_bytes,
            tensors=layout.views(np.broadcast_to(np.float32(0), layout.num_values)),
        ),
        layout=layout,
        signed_spec=run.signed_spec,
        coordinator=joined.client,
        publishes=joined.identity.public_key in joined.founders,
        kept=KEPT_BY_VOLUNTEER if joined.options.trains else KEPT_BY_SEED,
    )


async def meet_coordinator(
    options: PeerOptions, identity: Identity, stack: AsyncExitStack
) -> tuple[CoordinatorClient, RunInfo]:
    """The coordinator behind the invite's pin, and its run once every signature is right."""
    client = await CoordinatorClient.connect(options.invite, identity)
    stack.push_async_callback(client.close)
    run = await client.get_run()
    # Who has the run's data beside it was started with the coordinator, and may be the first.
    may_be_first = identity.public_key in run.genesis.voters or options.data_folder is not None
    for _ in range(SEED_WAIT_ATTEMPTS):
        if run.seed_addresses or may_be_first:
            break
        logger.info("no seed peer has told where it is yet")
        await asyncio.sleep(RETRY_S)
        run = await client.get_run()
    if not may_be_first and not run.seed_addresses:
        raise Unreachable("the run has no seed peer that says where it is", "ask the organizer to start one, or wait")
    return client, run


async def measure(options: PeerOptions, run: RunInfo) -> Hosting:
    """What of the run fits into this machine's memory, before anything is fetched; of several shards its speed, too.

    Raises `ResourceError`.
    """
    gc.collect()  # a replica that diverged takes room until then
    vocab_size, spec = data_manifest.parse(run.manifest_bytes).vocab_size, run.spec
    hosting = await asyncio.to_thread(choose_hosting, spec, vocab_size, options.device, options.memory_bytes)
    if spec.num_shards == 1:
        return hosting
    rows, threads = spec.inner.microbatch_sequences * spec.data.sequence_length, options.limits.num_threads
    flops = await asyncio.to_thread(try_flops, hosting.device, hosting.config.hidden_size, rows, threads)
    return replace(hosting, tried_flops=flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Who joins what, once the run's signatures are right.

    ``hosting``: what fits here, None on a seed peer. ``work_per_s``: as measured before a move, 0 where nothing was.
    """

    options: PeerOptions
    identity: Identity
    client: CoordinatorClient
    run: RunInfo
    hosting: Hosting | None
    work_per_s: float = 0.0


async def join(entry: Entry, stack: AsyncExitStack) -> Joined:
    """Open the network, be admitted, choose what to host, open the folders. ``stack`` closes what was opened."""
    options, identity, client, run = entry.options, entry.identity, entry.client, entry.run

    def clock() -> float:
        return time.time() + run.clock_offset_s

    papers = Papers()
    if options.trains:
        papers.admission = await client.admit(None, (), options.name)
    transport = await _open_transport(options, identity, run, clock, papers)
    stack.push_async_callback(transport.close)
    if not options.trains:
        papers.admission = await client.admit(None, own_addresses(options, transport), options.name)
    folder = options.home.run_folder(options.invite.run_id)
    chunks = ChunkStore(folder / "chunks", options.disk_bytes)
    manifest = data_manifest.parse(run.manifest_bytes)
    if options.data_folder is not None:
        chunks.add_source(token_shard_source(options.data_folder, manifest))
    if options.mirrors:
        chunks.add_source(token_shard_source(folder / token_mirror.FOLDER, manifest))
    if not options.trains:
        keep_genesis(folder, run.signed_genesis)
    kept = LedgerOptions(archive=not options.trains)
    hosting, reason = None, ""
    if entry.hosting is not None:
        hosting, reason = await _settle(entry, entry.hosting, transport, clock)
    ledgers = tuple(
        Ledger(folder / f"shard-{shard}", log.genesis_head(run.genesis, shard), chunks, kept)
        for shard in (range(run.spec.num_shards) if hosting is None else hosting.span.shards)
    )
    return Joined(
        options=options,
        identity=identity,
        client=client,
        run=run,
        manifest=manifest,
        clock=clock,
        transport=transport,
        papers=papers,
        folder=folder,
        chunks=chunks,
        ledgers=ledgers,
        book=HolderBook(random.Random(identity.public_key)),
        hosting=hosting,
        reason=reason,
    )


async def _settle(
    entry: Entry, hosting: Hosting, transport: LastingTransport, clock: Callable[[], float]
) -> tuple[Hosting, str]:
    """The span to host, and why: what all others tell decides, unless the whole model fits."""
    if hosting.choice.plan.span.is_whole:
        return hosting, "the whole model fits"
    rules, told = status_rules(entry.run), []
    for shard in range(entry.run.spec.num_shards):
        try:
            told.append(read_statuses(await transport.lookup(status_key(shard)), rules, clock()))
        except NetworkError as error:
            logger.info("shard %d: nobody's status can be had: %s", shard, error)
            told.append({})
    return await asyncio.to_thread(placing.settle, hosting, told, transport.public_key, entry.work_per_s)


def own_addresses(options: PeerOptions, transport: LastingTransport) -> tuple[str, ...]:
    """What a seed peer tells the coordinator of itself; nothing where a volunteer asks."""
    return () if options.trains else transport.addresses[:MAX_TOLD_ADDRESSES]


async def _open_transport(
    options: PeerOptions, identity: Identity, run: RunInfo, clock: Callable[[], float], papers: Papers
) -> LastingTransport:
    rules = status_rules(run)

    def admit_to_relay(caller: bytes, proof: bytes) -> None:
        if caller not in rules.founders:
            check_admission(read_signed(proof), caller, rules, clock())

    config = NetworkConfig(
        run_id=options.invite.run_id,
        clock=clock,
        directory_keys=tuple(status_key(shard) for shard in range(run.spec.num_shards)),
        host_maddrs=options.listen,
        announce_maddrs=options.announce,
        relay_for=None if options.trains else admit_to_relay,
        proof=papers.show if options.trains else None,
        upload_limit_bps=options.upload_limit_bps,
        keep=Spill(options.home.run_folder(options.invite.run_id)).put,
    )

    async def reopen(seeds: tuple[str, ...]) -> Network:
        others = tuple(address for address in seeds if not address.endswith(f"/p2p/{identity.peer_id}"))
        return await open_network(replace(config, initial_peers=others), identity)

    return LastingTransport(await reopen(run.seed_addresses), reopen, run.seed_addresses)
