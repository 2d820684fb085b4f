"""Reaching a run: its coordinator, its peers and its mirrors, for as long as a command takes.

Decides whom a download asks, and that a coordinator that is away is no obstacle: what is published then comes from
mirrors, by the same metadata, for as long as that is valid. Another key in the coordinator's place is refused. Leaves
fetching to `peer.checkpoints.download`, what is believed to `peer.checkpoints.trusted`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from peer.checkpoints.mirrored import Mirror, Offer
    from peer.checkpoints.sources import Source
    from peer.coordinator_client import CoordinatorClient, RunInfo
    from peer.p2p.transport import Transport
    from swarm.errors import SwarmError
    from swarm.invite import Invite
    from swarm.publication import Known, Publication
    from swarm.run_spec import RunSpec

T = TypeVar("T")
_STATUS_LIFETIME_S = 600.0  # the longest that the directory keeps a record


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What a person says about fetching: mirrors by URL, and how fast at most."""

    named: tuple[str, ...] = ()
    max_bytes_per_s: float | None = None


def trusted_folder(run_id: bytes) -> Path:
    """Where this machine keeps what it trusts of a run's metadata."""
    from swarm.keyfiles import data_home

    return data_home() / "trusted" / run_id.hex()


def known_of(run_id: bytes, spec: RunSpec) -> Known:
    """What this machine trusts of the run, for whoever checks a checkpoint's signatures."""
    from peer.checkpoints import trusted

    return trusted.known_of(trusted_folder(run_id), run_id, spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """The coordinator cannot be reached; ``told``: the mirrors that it named when it last could be."""

    error: SwarmError
    told: tuple[str, ...]


@asynccontextmanager
async def coordinator_or_mirrors(invite: Invite, where: Where) -> AsyncIterator[CoordinatorClient | Away]:
    """The coordinator; where it cannot be reached, and some mirror is known, that this is so."""
    from peer.checkpoints import mirrored
    from swarm.errors import DeadlineExceeded, Unreachable

    async with AsyncExitStack() as stack:
        found: CoordinatorClient | Away
        try:
            found = await stack.enter_async_context(coordinator(invite))
            await found.get_run()
        except (Unreachable, DeadlineExceeded) as error:
            told = await asyncio.to_thread(mirrored.remembered, trusted_folder(invite.run_id))
            if not where.named and not told:
                raise
            print(f"warning: {error}; asking mirrors what is published", file=sys.stderr)
            found = Away(error=error, told=told)
        yield found


async def of_mirrors(where: Where, away: Away, read: Callable[[Mirror], Awaitable[T]]) -> T:
    """What ``read`` makes of the first mirror that has it whole; what is wrong with all of them otherwise."""
    from peer.checkpoints.mirrors import open_mirrors
    from swarm.errors import NetworkError, VerificationError

    failures: list[SwarmError] = []
    async with open_mirrors(where.named, away.told, None) as found:
        for mirror in found:
            try:
                return await read(mirror)
            except (NetworkError, VerificationError) as error:
                failures.append(error)
                print(f"warning: {mirror.name}: {error}", file=sys.stderr)
    raise next((error for error in failures if isinstance(error, VerificationError)), away.error)


@asynccontextmanager
async def offered(invite: Invite, round_number: int, where: Where) -> AsyncIterator[tuple[Offer, list[Source]]]:
    """What is published of a round (0: the newest), and who may have its chunks."""
    from peer.checkpoints import mirrored

    folder = trusted_folder(invite.run_id)
    async with coordinator_or_mirrors(invite, where) as client:
        if isinstance(client, Away):
            offer = await of_mirrors(
                where, client, lambda mirror: mirrored.offer_of(mirror, folder, invite.run_id, round_number)
            )
        else:
            run, publication = await client.get_run(), await current_publication(client, invite, round_number)
            offer = mirrored.Offer(spec=run.spec, signed_spec=run.signed_spec, publication=publication)
            await asyncio.to_thread(mirrored.remember, folder, await client.mirrors())
        async with sources_of(client, invite, offer.round, where) as found:
            yield offer, found


async def current_publication(client: CoordinatorClient, invite: Invite, round_number: int) -> Publication:
    """What is published of a round (0: the newest), by metadata that this machine may trust."""
    from peer.checkpoints import trusted

    run = await client.get_run()
    source = trusted.files_source(await client.metadata())
    known = await asyncio.to_thread(trusted.refresh, trusted_folder(invite.run_id), invite.run_id, run.spec, source)
    publication = await client.checkpoint(round_number or known.newest_round)
    known.check(publication)
    return publication


@asynccontextmanager
async def sources_of(
    client: CoordinatorClient | Away, invite: Invite, round_number: int, where: Where
) -> AsyncIterator[list[Source]]:
    """Whoever may have this round: peers where they can be reached, mirrors, and the coordinator itself. Where it is
    away only mirrors: it knows the way to the others."""
    from peer.checkpoints import download as downloads
    from peer.checkpoints import mirrors
    from peer.checkpoints.sources import CoordinatorSource, PeerSource
    from peer.rounds.statuses import StatusRules
    from swarm.errors import NetworkError

    if isinstance(client, Away):
        async with mirrors.open_mirrors(where.named, client.told, round_number) as only:
            yield list(only)
        return
    run, told = await client.get_run(), await client.mirrors()
    rules = StatusRules(
        run_id=invite.run_id,
        publication_key=bytes.fromhex(run.spec.publication_key),
        founders=tuple(run.genesis.voters),
        lifetime_s=_STATUS_LIFETIME_S,
    )
    async with AsyncExitStack() as stack:
        found: list[Source] = list(
            await stack.enter_async_context(mirrors.open_mirrors(where.named, told, round_number))
        )
        found.append(CoordinatorSource(client))
        try:
            transport = await stack.enter_async_context(network(invite, run))
            now_unix_s = time.time() + run.clock_offset_s
            holders = await downloads.find_holders(transport, rules, round_number, now_unix_s)
            found += [PeerSource(transport, holder) for holder in holders]
        except NetworkError as error:
            print(f"warning: no peer can be reached ({error}); mirrors and the coordinator may do", file=sys.stderr)
        yield found


@asynccontextmanager
async def coordinator(invite: Invite) -> AsyncIterator[CoordinatorClient]:
    from peer.coordinator_client import CoordinatorClient

    client = await CoordinatorClient.connect(invite)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def network(invite: Invite, run: RunInfo) -> AsyncIterator[Transport]:
    """A connection to the run's peers under a key of its own, gone afterwards."""
    from peer.p2p.network import NetworkConfig, open_network
    from peer.rounds.statuses import status_key
    from swarm.identity import Identity

    config = NetworkConfig(
        run_id=invite.run_id,
        clock=lambda: time.time() + run.clock_offset_s,
        directory_keys=tuple(status_key(shard) for shard in range(run.spec.num_shards)),
        initial_peers=run.seed_addresses,
        dht_server=False,
    )
    network = await open_network(config, Identity.generate())
    try:
        yield network
    finally:
        await network.close()
