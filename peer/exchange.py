"""The edge of the round machine: carries out its actions over the transport, the disk and the trainer.

One per shard. Every event reaches the machine on the event loop; whatever takes long (encoding, averaging, applying,
fsync) runs beside it and comes back as an event. A peer that fell behind hands commits to the same machine, so there is
one way to apply a round.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError

from peer.chunk_store import ChunkStore
from peer.codec import Float32
from peer.fetch import fetch_chunk
from peer.ledger import Ledger
from peer.paxos import Ballot, ballot_of
from peer.round import RoundMachine
from peer.round_actions import Action, Apply, Fetch, Persist, Reduce, RoundSettings, Send, TakeSnapshot, View
from peer.shard import ReplicaSnapshot, Shard
from peer.transport import Transport
from swarm import schedule
from swarm.errors import NetworkError, ProtocolError, SwarmError
from swarm.identity import Identity
from swarm.log import VOTE_CONTEXT, LogHead, next_head
from swarm.proto.round_pb2 import Commit, Record, RoundMessage

ROUND_METHOD = "round"
MAX_EARLY_MESSAGES = 256
KEPT_SNAPSHOTS = 3
CONTROL_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)
T = TypeVar("T")


class Trainer(Protocol):
    """What a round asks of a replica under training; both happen between two inner steps."""

    async def snapshot(self) -> tuple[Float32, int]:
        """(weights as flat float32, tokens trained since the start)"""
        ...

    async def land(self, anchor: Float32, snapshot: Float32 | None, round_number: int) -> None:
        """Weights become ``anchor`` plus the movement since ``snapshot`` (None: just the anchor).

        The next round is ``round_number``. ``anchor`` is only read until the call returns.
        """
        ...

    @property
    def tokens(self) -> int:
        """Tokens trained since the start."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What happened in a round, for whoever watches."""

    record: Record
    head: LogHead
    state_digest: bytes
    counted: bool
    """our contribution is in it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeParts:
    """What an exchange is built from; ``trainer`` is None on a seed peer."""

    identity: Identity
    transport: Transport
    shard: Shard
    ledger: Ledger
    chunks: ChunkStore
    founders: tuple[bytes, ...]
    trainer: Trainer | None
    run_blocking: Callable[[Callable[[], Any]], Awaitable[Any]]
    on_commit: Callable[[Committed], Awaitable[None]]


class Exchange:
    def __init__(self, parts: ExchangeParts, applied: LogHead) -> None:
        """``applied``: the head that ``parts.shard`` stands at; the ledger may already hold later commits."""
        self.parts = parts
        self.shard = parts.shard
        self.head = applied
        self.behind = asyncio.Event()
        """set when there is something to tell or to ask at once: a round ended, or somebody is further on"""
        self.live_peers: tuple[bytes, ...] = ()
        """who may hold what we lack, by the newest statuses"""
        self._uncounted_from = parts.trainer.tokens if parts.trainer is not None else 0
        self._snapshots: dict[Ballot, ReplicaSnapshot] = {}
        self._early: list[tuple[bytes, RoundMessage]] = []
        self._known_commits: dict[int, tuple[bytes, Commit]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._persist_lock = asyncio.Lock()
        self._machine = self._new_machine()

    @property
    def round(self) -> int:
        """The round that is worked towards."""
        return self.head.round + 1

    @property
    def tokens(self) -> int:
        """Tokens trained here that no commit has counted yet."""
        return self.parts.trainer.tokens - self._uncounted_from if self.parts.trainer is not None else 0

    # ---- events from outside ------------------------------------------------------------------------------------

    async def handle_round(self, sender: bytes, request: bytes) -> bytes:
        """Transport handler of method ``round``: one `RoundMessage`; the answer is empty."""
        try:
            message = RoundMessage.FromString(request)
        except DecodeError as error:
            raise ProtocolError("a round message cannot be read") from error
        if message.shard != self.shard.index:
            raise ProtocolError(f"this peer does not host shard {message.shard}")
        if message.round < self.round:
            raise ProtocolError(f"round {message.round} is committed here; this replica works towards {self.round}")
        if message.round > self.round:
            self.behind.set()
            size = sum(len(kept.SerializeToString()) for _, kept in self._early) + len(request)
            room = 2 * self.shard.part_size_bytes(0, self.shard.num_slices) + (1 << 20)
            if message.round == self.round + 1 and len(self._early) < MAX_EARLY_MESSAGES and size <= room:
                self._early.append((sender, message))
            return b""
        self._do(self._machine.on_message(sender, message, self._now()))
        return b""

    def set_view(self, view: View) -> None:
        """Tell the machine who is live; only for the round that the view was made for."""
        self._do(self._machine.on_view(view, self._now()))

    def offer_commits(self, holder: bytes, commits: dict[int, Commit]) -> None:
        """Hand over commits that were fetched from ``holder``; each is verified when its turn comes."""
        for number, commit in commits.items():
            if number >= self.round:
                self._known_commits[number] = (holder, commit)
        self._use_known_commit()

    async def run(self) -> None:
        """Drive the machine's clock until cancelled; raises what went wrong beyond repair."""
        self._do(self._machine.on_tick(self._now()))
        self._use_known_commit()
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                wakeup = self._machine.next_wakeup()
                timeout = 1.0 if wakeup is None else min(1.0, max(0.0, wakeup - self._now()))
                try:
                    await asyncio.wait_for(self._wake.wait(), timeout or 0.001)
                except (TimeoutError, asyncio.TimeoutError):
                    self._do(self._machine.on_tick(self._now()))
                self._wake.clear()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- actions ------------------------------------------------------------------------------------------------

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            task = asyncio.get_running_loop().create_task(self._carry_out(self._machine, action))
            self._tasks.add(task)
            task.add_done_callback(self._done)
        self._wake.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._wake.set()

    async def _carry_out(self, machine: RoundMachine, action: Action) -> None:
        if isinstance(action, Send):
            await self._send(machine, action)
        elif isinstance(action, Persist):
            async with self._persist_lock:
                round_number = machine.settings.round
                await self._blocking(
                    lambda: self.parts.ledger.save_acceptor(round_number, action.acceptor, action.parts)
                )
            for answer in action.then:
                await self._send(machine, answer)
        elif isinstance(action, TakeSnapshot):
            await self._take_snapshot(machine, action)
        elif isinstance(action, Reduce):
            shares, encoded = await self._blocking(lambda: self.shard.reduce(action))
            self._event(machine, lambda now: machine.on_reduced(action.ballot, action.part, shares, encoded, now))
        elif isinstance(action, Fetch):
            await self._fetch(machine, action)
        else:
            await self._apply(action)

    async def _send(self, machine: RoundMachine, send: Send) -> None:
        if send.to == self.parts.identity.public_key:
            self._event(machine, lambda now: machine.on_message(send.to, send.message, now))
            return
        bulk = send.message.WhichOneof("body") in ("contribution", "average")
        timeout_s = (
            machine.settings.reduce_timeout_s if bulk else min(CONTROL_TIMEOUT_S, machine.settings.reduce_timeout_s)
        )
        try:
            await self.parts.transport.call(
                send.to, ROUND_METHOD, send.message.SerializeToString(), timeout_s=timeout_s, max_response_bytes=1024
            )
        except NetworkError as error:
            log.debug("round %d: %s", machine.settings.round, error)
            self._event(machine, lambda now: machine.on_unreachable(send.to, now))
        except SwarmError as error:
            log.info("round %d: refused: %s", machine.settings.round, error)

    async def _take_snapshot(self, machine: RoundMachine, action: TakeSnapshot) -> None:
        if self.parts.trainer is None:
            return
        weights, tokens = await self.parts.trainer.snapshot()
        uncounted = min(tokens - self._uncounted_from, machine.settings.max_weight_tokens)
        snapshot = await self._blocking(lambda: self.shard.offer(weights, uncounted, action.open))
        if machine is not self._machine or machine.finished:
            return
        if snapshot is None:
            log.warning("round %d: the replica is not finite; nothing to contribute", machine.settings.round)
            self._event(machine, lambda now: machine.on_snapshot(action.ballot, 0, [], now))
            return
        self._snapshots[action.ballot] = snapshot
        while len(self._snapshots) > KEPT_SNAPSHOTS:
            self._snapshots.pop(next(iter(self._snapshots)))
        encoded = [snapshot.encoded.get(part.first_slice, b"") for part in action.open.parts]
        weight = uncounted if snapshot.encoded else 0
        self._event(machine, lambda now: machine.on_snapshot(action.ballot, weight, encoded, now))

    async def _fetch(self, machine: RoundMachine, action: Fetch) -> None:
        data: bytes | None = self.parts.chunks.get(action.digest)
        if data is None:
            holders = list(dict.fromkeys([*action.holders, *self.live_peers]))
            try:
                data = await fetch_chunk(
                    self.parts.transport,
                    action.digest,
                    action.size_bytes,
                    holders,
                    timeout_s=machine.settings.reduce_timeout_s,
                )
            except SwarmError as error:
                log.debug("round %d: a part is not to be had yet: %s", machine.settings.round, error)
        self._event(machine, lambda now: machine.on_fetched(action.digest, data, now))

    def _event(self, machine: RoundMachine, event: Callable[[float], list[Action]]) -> None:
        """Feed an outcome back, unless its round is over."""
        if machine is self._machine:
            try:
                self._do(event(self._now()))
            except ProtocolError as error:
                log.info("round %d: %s", machine.settings.round, error)

    # ---- the end of a round -------------------------------------------------------------------------------------

    async def _apply(self, action: Apply) -> None:
        record = action.record
        head = next_head(self.head, action.commit.record, record)
        if self.parts.ledger.head.round < head.round:
            await self._blocking(lambda: self.parts.ledger.append(action.commit, head, action.parts))
        counted = await self._land(action)
        self.head = head
        if self.parts.ledger.is_state_due(head.round):
            await self._blocking(lambda: self.parts.ledger.save_state(head.round, self.shard))
        self._snapshots.clear()
        self._machine = self._new_machine()
        committed = Committed(record=record, head=head, state_digest=self.shard.state_digest, counted=counted)
        await self.parts.on_commit(committed)
        early, self._early = self._early, []
        for sender, message in early:
            if message.round == self.round:
                self._event(self._machine, lambda now, s=sender, m=message: self._machine.on_message(s, m, now))  # type: ignore[misc]
        self._use_known_commit()
        self.behind.set()
        self._wake.set()

    async def _land(self, action: Apply) -> bool:
        """Advance the shared state, then the replica: what the commit counted stays, what it did not is owed."""
        trainer, me = self.parts.trainer, self.parts.identity.public_key
        if trainer is None:
            await self._blocking(lambda: self.shard.apply(action.record, action.parts))
            return False
        snapshot = self._snapshots.get(ballot_of(action.record.opened_by))
        if snapshot is None:  # we were not in this round: all that we trained stays owed
            weights, _ = await trainer.snapshot()
            snapshot = await self._blocking(lambda: self.shard.owe(weights))

        def apply() -> bool:
            counted = snapshot is not None and self.shard.settle(action.record, action.parts, snapshot, me)
            self.shard.apply(action.record, action.parts)
            return counted

        counted = bool(await self._blocking(apply))
        if counted and snapshot is not None:
            self._uncounted_from += snapshot.tokens
        weights_then = snapshot.weights if snapshot is not None else None
        await trainer.land(self.shard.anchor, weights_then, action.record.round + 1)
        return counted

    def _use_known_commit(self) -> None:
        for number in [number for number in self._known_commits if number < self.round]:
            del self._known_commits[number]
        known = self._known_commits.pop(self.round, None)
        if known is None and self.parts.ledger.head.round >= self.round:
            commits = self.parts.ledger.commits(self.round, 1)
            known = (self.parts.identity.public_key, commits[0]) if commits else None
        if known is not None:
            holder, commit = known
            message = RoundMessage(shard=self.shard.index, round=self.round, commit=commit)
            self._event(self._machine, lambda now: self._machine.on_message(holder, message, now))

    def _new_machine(self) -> RoundMachine:
        rounds, head = self.shard.spec.rounds, self.head
        settings = RoundSettings(
            me=self.parts.identity.public_key,
            head=head,
            founders=self.parts.founders,
            state_digest=self.shard.state_digest,
            num_slices=self.shard.num_slices,
            codec=self.shard.codec.name,
            part_size_bytes=self.shard.part_size_bytes,
            sign_vote=lambda payload: self.parts.identity.sign(VOTE_CONTEXT, head.run_id, payload),
            max_weight_tokens=4 * schedule.tokens_of_round(rounds, head.round + 1),
            max_members=rounds.max_members,
            reduce_timeout_s=rounds.reduce_timeout_s,
            takeover_timeout_s=rounds.takeover_timeout_s,
        )
        return RoundMachine(settings, self.parts.ledger.load_acceptor(head.round + 1))

    async def _blocking(self, work: Callable[[], T]) -> T:
        return await self.parts.run_blocking(work)  # type: ignore[no-any-return]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
