"""Where a joined peer takes part from: the states that logs prove, from its own disk or from whoever holds them.

Decides whom to ask, and how often; and whom a seed peer asks for what its archive lacks. Leaves what a state must show
to `peer.rounds.catch_up`, and what this disk knows better to `peer.rounds.resume`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peer.checkpoints.backfilling import Backfill, Late
from peer.checkpoints.gathering import Gathering
from peer.checkpoints.publishing import StateCopy
from peer.joining import RETRY_S, Joined
from peer.p2p.reachability import seeds_of
from peer.rounds.catch_up import Newcomer, obtain_state
from peer.rounds.exchange import Exchange
from peer.rounds.ledger import Ledger
from peer.rounds.resume import resume
from peer.rounds.shard import Shard
from peer.rounds.statuses import read_statuses, status_key
from swarm.errors import NetworkError, NotFound
from swarm.log import LogHead

STATE_ATTEMPTS = 20
MEET_TIMEOUT_S = 5.0
MAX_HOLDERS_MET = 8

logger = logging.getLogger(__name__)


async def find_holders(joined: Joined, shard: int = 0) -> list[bytes]:
    """Peers that may hold what we need: seed peers first, then whoever tells a status of the shard."""
    own, seeds = joined.identity.public_key, seeds_of(joined.transport.seeds)
    met = await _meet(joined, {seed: addresses for seed, addresses in seeds.items() if seed != own})
    try:
        values = await joined.transport.lookup(status_key(shard))
    except NetworkError:
        values = {}
    others = read_statuses(values, joined.status_rules, joined.clock())
    # Of those behind a router only they themselves say the way.
    told = {peer: status.addresses for peer, status in others.items() if peer != own and peer not in seeds}
    await _meet(joined, dict(list(told.items())[:MAX_HOLDERS_MET]))
    return list(dict.fromkeys([*met, *told]))


async def _meet(joined: Joined, peers: Mapping[bytes, Sequence[str]]) -> list[bytes]:
    """Those of ``peers`` with which there is a connection now."""

    dials = (joined.transport.connect(peer, tuple(way), timeout_s=MEET_TIMEOUT_S) for peer, way in peers.items())
    outcomes = await asyncio.gather(*dials, return_exceptions=True)
    return [peer for peer, outcome in zip(peers, outcomes, strict=True) if outcome is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStart:
    """Where a peer takes part in the rounds of one shard from."""

    head: LogHead
    shard: Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a peer takes part from, in every shard.

    ``due``: checkpoints on the way there, that a crash may have prevented; those that other shards have yet to reach
    are in ``gathering``, which is None where a part of the model is hosted: no checkpoint can be made there.
    """

    shards: tuple[ShardStart, ...]
    due: tuple[StateCopy, ...]
    gathering: Gathering | None


async def find_start(joined: Joined) -> Start:
    """States, the rounds after them that this disk has, what this peer owed. Raises what the last attempt raised."""
    found = [await _starting_state(joined, ledger) for ledger in joined.ledgers]
    sizes, due = [shard.num_values for _, shard in found], list[StateCopy]()
    is_whole = len(found) == joined.run.spec.num_shards
    gathering = Gathering(joined.folder, sizes, archive=not joined.options.trains) if is_whole else None

    def look(head: LogHead, shard: Shard) -> None:
        if gathering is not None and joined.is_checkpoint_round(head.round):
            copy = gathering.add(head, shard)
            due.extend([copy] if copy is not None else [])

    starts = []
    for ledger, (head, shard) in zip(joined.ledgers, found, strict=True):
        head = await asyncio.to_thread(resume, ledger, head, shard, joined.identity.public_key, look)
        starts.append(ShardStart(head=head, shard=shard))
    return Start(shards=tuple(starts), due=tuple(due), gathering=gathering)


def newcomer_of(joined: Joined, ledger: Ledger) -> Newcomer:
    """What fetching a shard's states and log needs."""
    number = ledger.head.shard
    genesis = joined.run.genesis.shards[number]
    return Newcomer(
        transport=joined.transport,
        ledger=ledger,
        chunks=joined.chunks,
        spec=joined.run.spec,
        shard=number,
        genesis_digest=genesis.state_digest,
        num_values=genesis.num_values,
        book=joined.book,
    )


async def _starting_state(joined: Joined, ledger: Ledger) -> tuple[LogHead, Shard]:
    """Asks again while nobody offers one."""
    newcomer, number = newcomer_of(joined, ledger), ledger.head.shard
    for _ in range(STATE_ATTEMPTS - 1):
        try:
            return await obtain_state(newcomer, await find_holders(joined, number))
        except NotFound as error:
            logger.info("no state yet: %s", error)
            await asyncio.sleep(RETRY_S)
    return await obtain_state(newcomer, await find_holders(joined, number))


def backfill_of(joined: Joined, exchanges: Sequence[Exchange]) -> Backfill:
    """Of a seed peer: it may have joined late, or have lost its folder."""
    me = joined.identity.public_key
    shards = [
        Late(newcomer=newcomer_of(joined, ledger), at_rest=exchange.at_rest)
        for ledger, exchange in zip(joined.ledgers, exchanges, strict=True)
    ]

    def holders() -> list[bytes]:
        return [seed for seed in dict.fromkeys([*seeds_of(joined.transport.seeds), *joined.founders]) if seed != me]

    return Backfill(shards, holders)
