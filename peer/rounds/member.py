"""A replica among the others of its shard: tells its status, sees theirs, catches up, makes rounds.

Decides what is said and asked how often; the exchange does the rounds. The same class runs in a volunteer, in a seed
peer and in the simulation.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import HolderBook
from peer.p2p.reachability import is_relayed
from peer.p2p.transport import Transport
from peer.rounds.branches import fetch_branch, standing_apart
from peer.rounds.catch_up import COMMITS_PER_PAGE, Newcomer, fetch_commits
from peer.rounds.exchange import Exchange
from peer.rounds.ledger import Ledger
from peer.rounds.pace import Pace, Standing
from peer.rounds.planning import dial_patience_s
from peer.rounds.round_actions import View
from peer.rounds.statuses import StatusRules, further_on, make_view, read_statuses, sign_status, status_key
from peer.waiting import wait_for_news
from swarm import schedule
from swarm.errors import ProtocolError, SwarmError
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed
from swarm.proto.round_pb2 import LogReply, LogRequest, Record, Status

CONNECT_TIMEOUT_S = 5.0
MAX_DIALS = 16
LEAST_PAUSE_S = 0.2
MAX_BRANCHES_ASKED = 3

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Words:
    """What a replica says of itself besides where it stands; the runtime keeps it up to date."""

    trains: bool
    upload_bps: int
    """until it has been measured"""
    admission: Signed | None = None
    shard_tokens_per_s: Mapping[int, float] = field(default_factory=dict)
    service_tokens_per_s: float = 0.0
    """what we could train if we never waited for others"""
    leaving: bool = False
    checkpoint_round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberParts:
    identity: Identity
    transport: Transport
    exchange: Exchange
    ledger: Ledger
    chunks: ChunkStore
    rules: StatusRules
    words: Words
    clock: Callable[[], float]
    """unix time in seconds, corrected against the coordinator's"""
    pace: Pace = field(default_factory=Pace)
    """shared by the members of all shards that this peer hosts"""


class Member:
    def __init__(self, parts: MemberParts) -> None:
        self.parts = parts
        self.statuses: dict[bytes, Status] = {}
        self._connected: dict[bytes, tuple[str, ...]] = {}
        """the relays named by whom nobody can dial: other relays are another way to it"""
        self._apart: set[bytes] = set()
        """peers further on whose commits did not follow ours"""
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._rng = random.Random(parts.identity.public_key)

    async def run(self) -> None:
        """Until cancelled; raises what the exchange cannot repair."""
        driver = asyncio.ensure_future(self.parts.exchange.run())
        teller = asyncio.ensure_future(self._tell_and_look_for_ever())
        try:
            done, _ = await asyncio.wait({driver, teller}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            tasks = [driver, teller, *self._jobs.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def status(self) -> Status:
        exchange, words = self.parts.exchange, self.parts.words
        return Status(
            shard=exchange.shard.index,
            round=exchange.round,
            log_digest=exchange.head.log_digest,
            state_digest=exchange.shard.state_digest,
            tokens=exchange.replica.tokens,
            committed_tokens=exchange.head.total_tokens,
            tokens_per_s=words.shard_tokens_per_s.get(exchange.shard.index, 0.0),
            service_tokens_per_s=words.service_tokens_per_s,
            upload_bps=self.parts.transport.uplink_bps() or words.upload_bps,
            trains=words.trains,
            leaving=words.leaving,
            sent_unix_ms=int(self.parts.clock() * 1000),
            admission=words.admission,
            addresses=self.parts.transport.addresses[:8],
            checkpoint_round=words.checkpoint_round,
        )

    async def tell(self) -> None:
        """Publish our status; the directory forgets it after the lifetime that statuses have."""
        status = self.status()
        raw = sign_status(self.parts.identity, self.parts.rules.run_id, status)
        key = status_key(self.parts.exchange.shard.index)
        await self.parts.transport.publish(key, raw, lifetime_s=self.parts.rules.lifetime_s)

    async def look(self) -> None:
        """Read what the others say, and act on it: connect, give the machine its view, catch up."""
        exchange = self.parts.exchange
        values = await self.parts.transport.lookup(status_key(exchange.shard.index))
        self.statuses = read_statuses(values, self.parts.rules, self.parts.clock())
        self.statuses.pop(self.parts.identity.public_key, None)
        exchange.live_peers = tuple(self.statuses)
        self._beside("connect", self._connect_to_new)
        view = self._view()
        # The run ends by the first shard's tokens; the others follow its rounds, and none when it opens none.
        if exchange.shard.index or not schedule.is_finished(exchange.shard.spec, exchange.head.total_tokens):
            exchange.set_view(view)
        for job in self._jobs.values():
            if job.done():
                job.result()  # raises what it could not repair
        self._beside("catch up", self._catch_up)
        if standing_apart(self.statuses, self.parts.ledger, self._apart):
            self._beside("mend", self._mend)

    def _view(self) -> View:
        """Who stands where we stand, and whether it is our shard's turn."""
        # Connections come before the round: who cannot be reached yet would only be waited for.
        reached = {peer: status for peer, status in self.statuses.items() if peer in self._connected}
        view = make_view(reached, self.status(), self.parts.identity.public_key)
        rounds, shard, pace = self.parts.exchange.shard.spec.rounds, self.parts.exchange.shard.index, self.parts.pace
        pace.note(shard, Standing(round=self.parts.exchange.round, tokens=view.tokens))
        ready, why = pace.may_open(rounds, shard)
        log.debug("shard %d round %d: %s: %s", shard, self.parts.exchange.round, "ready" if ready else "waits", why)
        return replace(view, ready=ready)

    async def _tell_and_look_for_ever(self) -> None:
        interval_s = self.parts.exchange.shard.spec.rounds.status_interval_s
        while True:
            try:
                await self.tell()
                await self.look()
            except SwarmError as error:
                log.info("the directory did not serve: %s", error)
            # A round that was just decided, or somebody further on, is worth telling and asking at once.
            await asyncio.sleep(min(LEAST_PAUSE_S, interval_s))
            await wait_for_news(self.parts.exchange.behind, interval_s - LEAST_PAUSE_S)
            self.parts.exchange.behind.clear()

    def _beside(self, name: str, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do what may take long beside telling and looking; one of each kind at a time."""
        if name not in self._jobs or self._jobs[name].done():
            self._jobs[name] = asyncio.create_task(job())

    async def _connect_to_new(self) -> None:
        ways = {peer: tuple(s.addresses) if is_relayed(s.addresses) else () for peer, s in self.statuses.items()}
        new = {peer: s for peer, s in self.statuses.items() if self._connected.get(peer) != ways[peer]}
        self._connected = {peer: way for peer, way in self._connected.items() if peer in ways}

        dials = asyncio.Semaphore(MAX_DIALS)

        async def connect(peer: bytes, addresses: tuple[str, ...]) -> None:
            relayed = is_relayed(self.parts.transport.addresses), is_relayed(addresses)
            await asyncio.sleep(dial_patience_s(self.parts.identity.public_key, peer, relayed=relayed))
            try:
                async with dials:
                    await self.parts.transport.connect(peer, addresses, timeout_s=CONNECT_TIMEOUT_S)
                self._connected[peer] = ways[peer]
                self.parts.exchange.behind.set()
            except SwarmError as error:
                log.debug("no connection yet: %s", error)

        await asyncio.gather(*(connect(peer, tuple(s.addresses)) for peer, s in new.items()))

    async def _catch_up(self) -> None:
        """Fetch commits that others have and we lack; the exchange verifies and applies them in order."""
        exchange = self.parts.exchange
        ahead = further_on(self.statuses, exchange.round)
        founders = [peer for peer in ahead if peer in self.parts.rules.founders]
        # Whoever tells the highest round may lie: founders first, then anybody.
        for holder in [*founders, *self._rng.sample(ahead, min(len(ahead), 3))][:4]:
            try:
                commits = await fetch_commits(self.parts.transport, holder, exchange.shard.index, exchange.round)
            except SwarmError as error:
                log.info("could not catch up: %s", error)
                continue
            self._apart.discard(holder)
            if commits and exchange.offer_commits(holder, commits):
                return
            if commits:
                self._apart.add(holder)

    async def _mend(self) -> None:
        """Others stand on another branch: whoever proves that more was committed there is followed."""
        parts, exchange = self.parts, self.parts.exchange
        for holder in standing_apart(self.statuses, parts.ledger, self._apart)[:MAX_BRANCHES_ASKED]:
            try:
                branch = await fetch_branch(parts.transport, holder, parts.ledger, exchange.shard.spec)
            except SwarmError as error:
                log.info("no branch to be followed: %s", error)
                continue
            if branch is not None:
                holders = [holder, *(peer for peer in self.statuses if peer != holder)]
                self._apart.clear()
                return await exchange.switch(branch, self._newcomer(), holders)

    def _newcomer(self) -> Newcomer:
        parts, shard = self.parts, self.parts.exchange.shard
        first = Record.FromString(parts.ledger.commits(1, 1)[0].record)
        return Newcomer(
            transport=parts.transport,
            ledger=parts.ledger,
            chunks=parts.chunks,
            spec=shard.spec,
            shard=shard.index,
            genesis_digest=first.state_digest,
            num_values=shard.num_values,
            book=HolderBook(self._rng),
        )

    def answer_log(self, wanted: LogRequest) -> LogReply:
        """Commits of this shard's log from a round on. Raises `ProtocolError`."""
        if wanted.first_round < 1:
            raise ProtocolError("a request for a log that is not here")
        count = min(COMMITS_PER_PAGE, wanted.max_commits)
        return LogReply(commits=self.parts.ledger.commits(wanted.first_round, count))
