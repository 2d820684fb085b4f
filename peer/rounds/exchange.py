"""The edge of the round machine: carries out its actions over the transport, the disk and the trainer.

One per shard. Every event reaches the machine on the event loop; whatever takes long (encoding, averaging, applying,
fsync) runs beside it and comes back as an event. A peer that fell behind hands commits to the same machine, so there is
one way to apply a round.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from peer.p2p.spill import Spill
from peer.rounds import resume
from peer.rounds.branches import Branch
from peer.rounds.catch_up import Newcomer
from peer.rounds.disputes import false_averages, write_down
from peer.rounds.exchange_parts import (
    Committed,
    EarlyMessages,
    ExchangeParts,
    Lookout,
    Refusals,
    choose_codec,
    obtain,
    round_settings,
    uplink_of,
)
from peer.rounds.hearing import Hearing
from peer.rounds.mending import debt_of, describe, heir, record_incident, state_of_branch
from peer.rounds.replica import Replica
from peer.rounds.round import RoundMachine
from peer.rounds.round_actions import Action, Apply, Fetch, Offered, Persist, Reduce, Send, TakeSnapshot, View
from peer.waiting import wait_for_news
from swarm.errors import (
    DiskFull,
    DivergedError,
    NetworkError,
    NotFound,
    ProtocolError,
    ResourceError,
    SwarmError,
    Unreachable,
)
from swarm.files import Kept
from swarm.log import LogHead, gone_of, next_head, tokens_by_peer
from swarm.proto.round_pb2 import Commit, RoundMessage

ROUND_METHOD = "round"
CONTROL_TIMEOUT_S = 10.0
MAX_FETCHES = 4
LEAST_WAIT_S = 0.001

log = logging.getLogger(__name__)
T = TypeVar("T")


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
        self._state_lock = asyncio.Lock()
        self._spill = Spill(parts.ledger.folder)
        self.shard.reducer_debt.keep, self.shard.reducer_debt.me = self._spill.put, parts.identity.public_key
        self._early, self._refusals = EarlyMessages(self._spill), Refusals()
        # One part at a time is in memory, encoded, averaged or made a message of; and as few are being fetched.
        self._at_work = asyncio.Lock()
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self.replica = Replica(parts, self._at_work)
        self.hearing = Hearing(parts.transport, applied, self.shard.spec.rounds.lease_s, parts.lease_clock)
        self._newest_request: tuple[RoundMessage | None, Kept] = None, b""
        self._asking: set[bytes] = set()
        self._lookout = Lookout()
        self._round_began_at: float | None = None
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

    # ---- events from outside ------------------------------------------------------------------------------------

    def on_message(self, sender: bytes, message: RoundMessage, request: bytes) -> None:
        """What ``sender`` says of this shard's rounds; ``request``: the message as it came."""
        self.hearing.heard(sender)
        if message.round <= max(self.head.round, self.parts.ledger.head.round):
            raise ProtocolError(f"round {message.round} is committed here; this replica works towards {self.round}")
        if message.round > self.round:
            self._keep_early(sender, message, request)
            return
        self._machine.standing = self.hearing.standing()
        try:
            self._do(self._machine.on_message(sender, message, self._now()))
        except (DivergedError, DiskFull) as error:
            self._fail(error)

    def _keep_early(self, sender: bytes, message: RoundMessage, request: bytes) -> None:
        """Others may have committed our round already: keep what they say of the next, within bounds, and ask them."""
        if sender not in self.live_peers and sender not in self.head.voters:
            raise ProtocolError(f"round {message.round} has not begun here, and we do not know you")
        self.behind.set()
        if message.round == self.round + 1:
            self._early.keep(sender, request, self.shard.round_bytes + (1 << 20))

    def set_view(self, view: View) -> None:
        """Tell the machine who is live; only for the round that the view was made for."""
        self._event(self._machine, lambda now: self._machine.on_view(view, now))

    def offer_commits(self, holder: bytes, commits: dict[int, Commit]) -> bool:
        """Hand over commits that were fetched from ``holder``; False where the first is of no use, as then all are.

        Each is verified when its turn comes.
        """
        for number, commit in commits.items():
            if number >= self.round:
                self._known_commits[number] = (holder, commit)
        return self._use_known_commit()

    def at_rest(self) -> asyncio.Lock:
        """Whoever holds it knows that the shard's state does not change. Not for those who hear of its commits."""
        return self._state_lock

    async def reset_replica(self) -> None:
        """Put the replica back onto the anchor, with fresh moments; what it had offered in this round stays offered."""
        async with self._state_lock:
            await self.replica.reset(self.round)

    async def run(self) -> None:
        """Drive the machine's clock until cancelled; raises what went wrong beyond repair."""
        self._use_known_commit()
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                self._ask_who_is_awaited(self._machine)
                wakeup = self._machine.next_wakeup()
                until_wakeup = Lookout.EVERY_S if wakeup is None else wakeup - self._now()
                timeout = min(Lookout.EVERY_S, max(LEAST_WAIT_S, until_wakeup))
                if not await wait_for_news(self._wake, timeout):
                    self._event(self._machine, self._machine.on_tick)
                self._wake.clear()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ask_who_is_awaited(self, machine: RoundMachine) -> None:
        """Ask for leases; and a peer that died with its messages delivered would be waited for until the deadline."""
        awaited = self._lookout.asks(machine.awaited, self._now())
        for peer in {*awaited, *self.hearing.due()} - self._asking:
            task = asyncio.get_running_loop().create_task(self._ask(machine, peer, awaited.get(peer, 0.0)))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    async def _ask(self, machine: RoundMachine, peer: bytes, waited_s: float) -> None:
        self._asking.add(peer)
        try:
            if await self.hearing.ask(peer, waited_s):
                self.behind.set()
        except (Unreachable, NotFound):  # no such process, or not yet again
            if peer in machine.awaited():  # and not only asked for a lease: it may be back long before the round opens
                self._event(machine, lambda now: machine.on_ended(peer, now))
        except SwarmError as error:
            log.debug("a peer that was asked is slow: %s", error)
        finally:
            self._asking.discard(peer)

    # ---- actions ------------------------------------------------------------------------------------------------

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            task = asyncio.get_running_loop().create_task(self._carry_out(self._machine, action))
            self._tasks.add(task)
            task.add_done_callback(self._done)
        self._wake.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._wake.set()

    async def _carry_out(self, machine: RoundMachine, action: Action) -> None:
        if isinstance(action, Send):
            await self._send(machine, action)
        elif isinstance(action, Persist):
            if not await self._persist(machine, action):
                return
            for answer in action.then:
                await self._send(machine, answer)
        elif isinstance(action, TakeSnapshot):
            await self._take_snapshot(machine, action)
        elif isinstance(action, Reduce):
            async with self._at_work:
                average, encoded = await self._blocking(lambda: self.shard.reduce(action))
            self._event(machine, lambda now: machine.on_reduced(action.ballot, average, encoded, now))
        elif isinstance(action, Fetch):
            await self._fetch(machine, action)
        else:
            async with self._state_lock:
                if machine is self._machine:  # and not of a branch that was given up meanwhile
                    await self._apply_locked(action)

    async def _send(self, machine: RoundMachine, send: Send) -> None:
        if send.to == self.parts.identity.public_key:
            self._event(machine, lambda now: machine.on_message(send.to, send.full(), now))
            return
        timeout_s, request = machine.settings.reduce_timeout_s, await self._request(send)
        if not send.is_large:
            timeout_s = min(CONTROL_TIMEOUT_S, timeout_s)
        asked_at = self.hearing.clock()
        try:
            await self.parts.transport.call(
                send.to, ROUND_METHOD, request, timeout_s=timeout_s, max_response_bytes=1024
            )
            self.hearing.answered(send.to, asked_at)
        except NetworkError as error:
            log.debug("round %d: %s", machine.settings.round, error)
            self._event(machine, lambda now: machine.on_unreachable(send.to, now))
        except SwarmError as error:
            self._refusals.hear(send.message, str(error))

    async def _request(self, send: Send) -> Kept:
        """A message's bytes; those of a large one on disk, as it may take long until they have left."""
        if not send.is_large:
            return send.message.SerializeToString()
        async with self._at_work:
            message, kept = self._newest_request
            if message is not send.message:  # an average goes to everybody in the same bytes
                kept = await self._blocking(lambda: self._spill.put(send.full().SerializeToString()))
                self._newest_request = send.message, kept
            return kept

    async def _persist(self, machine: RoundMachine, action: Persist) -> bool:
        """In the order of asking; False where the round is over and no vote counts any more."""
        async with self._persist_lock:
            if machine is not self._machine:
                return False
            try:
                await self._blocking(
                    lambda: self.parts.ledger.save_acceptor(machine.settings.round, action.acceptor, action.parts)
                )
            except ProtocolError as error:
                log.debug("%s", error)
                return False
        return True

    async def _take_snapshot(self, machine: RoundMachine, action: TakeSnapshot) -> None:
        offered: Offered | None = Offered()
        try:
            round_s = None if self._round_began_at is None else self._now() - self._round_began_at
            uplink = uplink_of(self.shard, machine, len(action.open.members), round_s)
            snapshot = await self.replica.offer(
                lambda: machine is self._machine and not machine.finished,
                lambda: choose_codec(self.shard, machine.settings.round, uplink),
                machine.settings.max_weight_tokens,
            )
            # The snapshot is booked, or a leader opens faster than we can encode: only the newest counts.
            is_wanted = lambda: not machine.finished and machine.is_newest(action.ballot)  # noqa: E731
            fit = functools.partial(uplink.fit_beside, turn=machine.settings.round)
            offered = await self.replica.encode(snapshot, action, self._spill.put, is_wanted, fit)
        except DiskFull:
            raise  # the person has to see to it: nothing could ever be sent again
        except ResourceError as error:
            log.warning("round %d: nothing to contribute: %s", machine.settings.round, error)
        if (ready := offered) is not None:
            self._event(machine, lambda now: machine.on_snapshot(action.ballot, ready, now))

    async def _fetch(self, machine: RoundMachine, action: Fetch) -> None:
        async with self._fetches:
            holders = list(dict.fromkeys([*self.live_peers, *action.holders]))
            turn = action.digest[0] % max(1, len(holders))  # not every part from the same uplink
            holders = holders[turn:] + holders[:turn]
            data = await obtain(self.parts, action, holders, machine.settings.reduce_timeout_s)
            self._event(machine, lambda now: machine.on_fetched(action.digest, data, now))

    def _event(self, machine: RoundMachine, event: Callable[[float], list[Action]]) -> None:
        """Feed an outcome back, unless its round is over. What a peer got wrong is its own affair."""
        if machine is self._machine:
            machine.standing = self.hearing.standing()
            try:
                self._do(event(self._now()))
            except (DivergedError, DiskFull) as error:
                self._fail(error)
            except SwarmError as error:
                log.info("round %d: %s", machine.settings.round, error)

    # ---- the end of a round -------------------------------------------------------------------------------------

    async def _apply_locked(self, action: Apply) -> None:
        """First the disk, then the shared state, then the replica; the next round begins before the state is saved."""
        head = next_head(self.head, action.commit.record, action.record)
        if gone_of(action.commit, self.head):  # a branch: where it is given up for another, this state is wanted
            await self._blocking(lambda: self.parts.ledger.save_state(self.head.round, self.shard))
        if self.parts.ledger.head.round < head.round:
            await self._blocking(lambda: self.parts.ledger.append(action.commit, head, action.parts))
        else:
            await self._blocking(lambda: self.parts.ledger.keep_parts(head.round, action.parts))
        counted = await self.replica.land(action) and self.parts.identity.public_key in tokens_by_peer(action.record)
        self.replica.begin()
        false = false_averages(action.record, self._machine.attempt, self.shard.too_long)
        self._begin_round(head)
        told = Committed(
            record=action.record,
            head=head,
            state_digest=self.shard.state_digest,
            counted=counted,
            refused=self._refusals.take(),
            disputed=await self._blocking(lambda: write_down(self.parts.ledger.folder, false)),
        )
        await self.parts.on_commit(told)
        await self._blocking(lambda: resume.save(self.parts.ledger, head, self.shard))

    async def switch(self, branch: Branch, newcomer: Newcomer, holders: Sequence[bytes]) -> None:
        """Give up our commits since the fork, and stand on ``branch``; nothing happens where our log went on meanwhile.

        Raises `DivergedError` where its state is not to be had: the disk has its log by then.
        """
        async with self._state_lock, self._persist_lock:
            ledger = self.parts.ledger
            if ledger.head != branch.instead_of:
                return
            self._machine.finished = True
            incident = describe(branch, ledger, int(time.time()))
            log.error("incident: %s", incident)
            debt = None
            if heir(branch, ledger) == self.parts.identity.public_key:
                debt = await debt_of(branch, newcomer, holders, self.head)
            await self._blocking(lambda: record_incident(ledger.folder, asdict(incident)))
            await self._blocking(lambda: ledger.replace_tail(branch.fork, branch.tail))
            head, fresh = await state_of_branch(newcomer, holders)
            await self.replica.move(fresh, debt, head)
            await self._blocking(lambda: resume.save(ledger, head, self.shard))
            self._known_commits.clear()
            self._begin_round(head)
        self.parts.on_incident(incident)

    def _begin_round(self, head: LogHead) -> None:
        """What others said of this round while we were in the last, and a commit of it that is known already."""
        self.head, self._round_began_at = head, self._now()
        self.hearing.begin(head)
        machine = self._machine = self._new_machine()
        for sender, message in self._early.take():
            self._event(machine, lambda now, s=sender, m=message: machine.on_message(s, m, now))  # type: ignore[misc]
        self._use_known_commit()
        self.behind.set()
        self._wake.set()

    def _use_known_commit(self) -> bool:
        for number in [number for number in self._known_commits if number < self.round]:
            del self._known_commits[number]
        known = self._known_commits.pop(self.round, None)
        if known is None and self.parts.ledger.head.round >= self.round:
            commits = self.parts.ledger.commits(self.round, 1)
            known = (self.parts.identity.public_key, commits[0]) if commits else None
        if known is None:
            return True
        holder, commit = known
        message = RoundMessage(shard=self.shard.index, round=self.round, commit=commit)
        self._machine.standing = self.hearing.standing()
        try:
            self._do(self._machine.on_message(holder, message, self._now()))
        except (DivergedError, DiskFull) as error:
            self._fail(error)
        except SwarmError as error:
            log.info("a commit from a holder is of no use, nor is what it sent with it: %s", error)
            self._known_commits = {n: (h, c) for n, (h, c) in self._known_commits.items() if h != holder}
            return False
        return True

    def _new_machine(self) -> RoundMachine:
        settings = round_settings(self.parts, self.head, self._spill)
        return RoundMachine(settings, self.parts.ledger.load_acceptor(settings.round))

    async def _blocking(self, work: Callable[[], T]) -> T:
        return await self.parts.run_blocking(work)  # type: ignore[no-any-return]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
