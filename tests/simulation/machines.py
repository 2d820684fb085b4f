"""Round machines without a network: every message, disk write and tick is an event that a test may order as it likes.

The machines are the real ones; averaging is replaced by joining bytes. A crash forgets everything except what was
persisted before; a message may be lost, repeated, or arrive in any order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from peer.rounds.leases import Leases, Standing
from peer.rounds.paxos import Acceptor
from peer.rounds.planning import Candidate
from peer.rounds.round import RoundMachine
from peer.rounds.round_actions import (
    Action,
    Apply,
    Fetch,
    Offered,
    Persist,
    Reduce,
    RoundSettings,
    Send,
    TakeSnapshot,
    View,
)
from swarm.averages import AVERAGE_CONTEXT
from swarm.digest import sha256
from swarm.errors import SwarmError
from swarm.files import Kept
from swarm.identity import Identity
from swarm.log import VOTE_CONTEXT, LogHead, gone_of, verify_commit
from swarm.proto.round_pb2 import Average, Record, RoundMessage, Vote

RUN_ID = b"r" * 20
STATE = b"s" * 32
NUM_SLICES = 6
BYTES_PER_SLICE = 4

Event = Callable[[], list[Action]]
TRAINED_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Waiting:
    """What may happen next: an event of ``peer``, in one of its lives; with a ``sender`` it is a message."""

    peer: Machine
    life: int
    event: Event
    sender: bytes | None = None
    kind: str = ""
    """of the message: the name of its body"""


@dataclass
class Machine:
    """One replica: its machine, and what survives its crashes."""

    identity: Identity
    trains: bool
    durable: Acceptor = field(default_factory=Acceptor)
    stored: dict[bytes, Kept] = field(default_factory=dict)
    machine: RoundMachine | None = None
    applied: Apply | None = None
    writes: list[Persist] = field(default_factory=list)
    life: int = 0
    leases: Leases | None = None
    heard_at: dict[bytes, float] = field(default_factory=dict)
    """what its leases must go by, noted beside them"""
    asleep: bool = False

    @property
    def key(self) -> bytes:
        return self.identity.public_key


class Machines:
    """``voters`` of ``size`` replicas decide; the last replica only receives, as a seed peer does."""

    def __init__(
        self, size: int, voters: int, rng: random.Random, max_members: int = 64, lease_s: float = 100_000.0
    ) -> None:
        self.lease_s = lease_s
        self.rng = rng
        self.max_members = max_members
        self.now = 0.0
        self.peers = [Machine(Identity(bytes([i + 1]) * 32), trains=i < size - 1) for i in range(size)]
        self.head = LogHead(
            run_id=RUN_ID,
            shard=0,
            round=4,
            log_digest=b"l" * 32,
            voters=tuple(peer.key for peer in self.peers[-voters:]),
            total_tokens=100,
            founders=(),
        )
        self.waiting: list[Waiting] = []
        self.cut: set[tuple[bytes, bytes]] = set()
        """(from, to): messages that a partition holds back, in one direction"""
        self.lost_kinds: set[str] = set()
        """messages of these kinds never arrive"""
        self.commits: set[bytes] = set()
        self.branches: set[bytes] = set()
        """of the commits: those that went on without somebody"""
        for peer in self.peers:
            self._start(peer)

    def _start(self, peer: Machine) -> None:
        settings = RoundSettings(
            me=peer.key,
            head=self.head,
            founders=(self.peers[-1].key,),
            state_digest=STATE,
            num_slices=NUM_SLICES,
            codec="int8",
            part_size_bytes=lambda first, count: count * BYTES_PER_SLICE,
            round_bytes=2 * NUM_SLICES * BYTES_PER_SLICE,
            check_contribution=lambda first, count, codec, encoded: None,
            check_handed_over=lambda first, count, message: None,
            check_part=lambda first, count, encoded: None,
            sign_vote=lambda payload: peer.identity.sign(VOTE_CONTEXT, RUN_ID, payload),
            sign_average=lambda payload: peer.identity.sign(AVERAGE_CONTEXT, RUN_ID, payload),
            round_tokens=250,
            max_weight_tokens=1000,
            max_members=self.max_members,
            may_vote=True,
            reduce_timeout_s=8.0,
            takeover_timeout_s=6.0,
        )
        peer.machine = RoundMachine(settings, peer.durable)
        peer.machine.standing = Standing(held=frozenset(self.head.voters), present=True)  # until leases say otherwise
        peer.leases = Leases(peer.key, self.head, self.lease_s, self.now)
        peer.heard_at = dict.fromkeys(self.head.voters, self.now)
        view = View(
            candidates=tuple(Candidate(key=p.key, trains=p.trains, upload_bps=1) for p in self.peers), ready=True
        )
        self._later(peer, lambda: self._machine(peer).on_view(view, self.now))

    def crash(self, peer: Machine) -> None:
        """Forget what was not persisted, and start again."""
        peer.life += 1
        peer.writes.clear()
        if peer.applied is None:
            self._start(peer)

    def deliver(self, index: int, faults: bool) -> None:
        """Let what waits at ``index`` happen, unless a partition holds it back; a message may be lost or repeated."""
        item = self.waiting[index]
        if self._is_held(item):
            return
        del self.waiting[index]
        if faults and item.sender is not None and self.rng.random() < 0.1:
            if self.rng.random() < 0.5:
                return  # lost
            self.waiting.append(item)  # repeated
        self._happen(item)

    def pass_time(self, elapsed_s: float) -> None:
        """Later, everybody looks at the clock."""
        self.now += elapsed_s
        for peer in self.peers:
            self._later(peer, lambda p=peer: self._machine(p).on_tick(self.now))
            self._later(peer, lambda p=peer: self._ping(p))

    def _ping(self, peer: Machine) -> list[Action]:
        """Ask for leases, as the edge does at every look at the clock."""
        for voter in self._leases(peer).due(self.now):
            target = self.peer(voter)
            ping = lambda t=target: self._answer(t, peer, self.now)  # noqa: E731
            self.waiting.append(Waiting(target, target.life, ping, peer.key, "ping"))
        return []

    def _answer(self, peer: Machine, asker: Machine, asked_at: float) -> list[Action]:
        """``asker`` called ``peer``: it has a lease from now on, and knows it when the answer is there."""
        self._leases(peer).heard(asker.key, self.now)
        peer.heard_at[asker.key] = self.now
        further_on = peer.applied is not None

        def arrive() -> list[Action]:
            self._leases(asker).answered(peer.key, asked_at, further_on)
            return []

        self.waiting.append(Waiting(asker, asker.life, arrive, peer.key, "answer"))
        return []

    def sleep(self, peer: Machine, elapsed_s: float) -> None:
        """``peer``'s machine sleeps while the others go on; its clock counts that."""
        peer.asleep = True
        until = self.now + elapsed_s
        while self.now < until:
            self.go_on()
        peer.asleep = False

    def hear_that_it_is_gone(self, peer: Machine, other: bytes) -> None:
        """``peer`` asked whether ``other`` lives, and there was no way to it. Nobody asks itself."""
        if other != peer.key:
            self._later(peer, lambda: self._machine(peer).on_ended(other, self.now))

    def separate(self, one: set[bytes], other: set[bytes]) -> None:
        """From now on nothing that ``one`` says reaches ``other``."""
        self.cut |= {(sender, target) for sender in one for target in other if sender != target}

    def lose(self, share: float) -> None:
        """``share`` of the messages under way, at random, never arrive."""
        self.waiting = [item for item in self.waiting if item.sender is None or self.rng.random() >= share]

    def settle(self, at_most_s: float = 300.0, *, tell: bool = True) -> None:
        """No more faults: everything that is under way arrives, in any order, before time moves on.

        ``tell`` False: those who know the result keep it to themselves, and the others must come to the same.
        """
        self.cut.clear()
        until = self.now + at_most_s
        while self.now < until and any(peer.applied is None for peer in self.peers):
            self.go_on()
            if tell:
                self._tell_who_is_behind()

    def go_on(self) -> None:
        """All that is under way and held back by no partition arrives, in any order; then time moves on a little."""
        batch, self.waiting = self.waiting, []
        self.rng.shuffle(batch)
        for item in batch:
            if self._is_held(item):
                self.waiting.append(item)
            else:
                self._happen(item)
        self.pass_time(0.2)

    def _is_held(self, item: Waiting) -> bool:
        return item.peer.asleep or (item.sender is not None and (item.sender, item.peer.key) in self.cut)

    def _happen(self, item: Waiting) -> None:
        peer = item.peer
        if item.life != peer.life or (peer.applied is not None and item.kind not in ("ping", "answer")):
            return
        self._machine(peer).standing = self._leases(peer).standing(self.now)
        try:
            actions = item.event()
        except SwarmError:
            return  # refused; the sender would be told
        for action in actions:
            self._carry_out(peer, action)

    def _carry_out(self, peer: Machine, action: Action) -> None:
        machine = self._machine(peer)
        if isinstance(action, Send):
            self._send(peer, action)
        elif isinstance(action, Persist):
            self._check_vote(peer, action)
            peer.writes.append(action)  # writes happen in order, whenever they happen
            self._later(peer, lambda: self._write(peer))
        elif isinstance(action, TakeSnapshot):
            encoded = [bytes([self.rng.randrange(256)]) * (p.num_slices * BYTES_PER_SLICE) for p in action.open.parts]
            norms = [(0.0, 0.0)] * len(encoded)
            offered = Offered(weight_tokens=TRAINED_TOKENS, codec="int8", encoded=encoded, norms=norms)
            self._later(peer, lambda: machine.on_snapshot(action.ballot, offered, self.now))
        elif isinstance(action, Reduce):
            joined = b"".join(data for _, _, data in action.contributions)
            average = sha256(joined)[:1] * (action.num_slices * BYTES_PER_SLICE)
            shares = [share for share, _, _ in action.contributions]
            reduced, data = Average(part=action.part, shares=shares), average if shares else b""
            self._later(peer, lambda: machine.on_reduced(action.ballot, reduced, data, self.now))
        elif isinstance(action, Fetch):
            self._later(peer, lambda: machine.on_fetched(action.digest, self._find(action), self.now))
        elif isinstance(action, Apply):
            self._apply(peer, action)

    def _check_vote(self, peer: Machine, action: Persist) -> None:
        """Whoever goes on without somebody has not heard of it for a lease."""
        for send in action.then:
            if send.message.WhichOneof("body") == "vote":
                for voter in Vote.FromString(send.message.vote.payload).gone:
                    assert self.now - peer.heard_at[voter] >= self.lease_s, "a lease was broken"

    def _write(self, peer: Machine) -> list[Action]:
        action = peer.writes.pop(0)
        peer.durable = action.acceptor
        peer.stored.update(action.parts)
        return list(action.then)

    def _apply(self, peer: Machine, action: Apply) -> None:
        record, _ = verify_commit(self.head, action.commit)
        assert {part.digest for part in record.parts if part.digest} == set(action.parts), "every byte is here"
        peer.applied = action
        peer.stored.update(action.parts)
        self.commits.add(sha256(action.commit.record))
        if gone_of(action.commit, self.head):
            self.branches.add(sha256(action.commit.record))

    def _tell_who_is_behind(self) -> None:
        """Whoever has the commit hands it to whoever lacks it, as statuses and the log make sure of."""
        holder = next((peer for peer in self.peers if peer.applied is not None), None)
        if holder is None or holder.applied is None:
            return
        message = RoundMessage(round=self.head.round + 1, commit=holder.applied.commit)
        for peer in self.peers:
            if peer.applied is None:
                self._later(peer, lambda p=peer, h=holder: self._machine(p).on_message(h.key, message, self.now))

    def _send(self, sender: Machine, send: Send) -> None:
        target, asked_at = self.peer(send.to), self.now

        def arrival() -> list[Action]:
            if target is not sender:
                self._answer(target, sender, asked_at)
            return self._machine(target).on_message(sender.key, send.full(), self.now)

        if send.message.WhichOneof("body") in self.lost_kinds and target is not sender:
            return
        # What a replica hands to itself crosses no network.
        by = None if target is sender else sender.key
        self.waiting.append(Waiting(target, target.life, arrival, by, send.message.WhichOneof("body") or ""))

    def _find(self, action: Fetch) -> bytes | None:
        for peer in self.peers:
            if action.digest in peer.stored:
                return peer.stored[action.digest][:]
            if peer.machine is not None and action.digest in peer.machine.held.by_digest:
                return peer.machine.held.by_digest[action.digest][:]
        return None

    def _later(self, peer: Machine, event: Event) -> None:
        self.waiting.append(Waiting(peer, peer.life, event))

    def peer(self, key: bytes) -> Machine:
        return next(peer for peer in self.peers if peer.key == key)

    def _leases(self, peer: Machine) -> Leases:
        assert peer.leases is not None
        return peer.leases

    def _machine(self, peer: Machine) -> RoundMachine:
        assert peer.machine is not None
        return peer.machine


def records_of(machines: Machines) -> list[Record]:
    return [peer.applied.record for peer in machines.peers if peer.applied is not None]
