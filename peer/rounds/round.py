"""The round machine: one round of one shard as one replica lives it. Events in, actions out.

Decides everything about a round: who leads, who is in, what is averaged, what is committed. It has no clock (``now`` is
an argument, seconds of any monotonic clock), no sockets and no disk; `peer.rounds.exchange` carries out its actions. A
machine is born with the head of the log, and ends with one `Apply`.

The steps (docs/protocol.md): a leader prepares a ballot with the voters, opens the round for the members, members send
encoded parts to reducers, reducers send each average to all, the leader proposes the record, voters accept it once it
and its bytes are on their disks, and a majority's votes are the commit.
"""

from __future__ import annotations

from collections.abc import Sequence

from peer.rounds.attempt import Attempt, check_open
from peer.rounds.held_parts import HeldParts
from peer.rounds.leader import Leader, round_message
from peer.rounds.leases import Standing
from peer.rounds.paxos import NO_BALLOT, Acceptor, Ballot, ballot_of, to_message
from peer.rounds.round_actions import (
    Action,
    Apply,
    Offered,
    Outbox,
    Persist,
    RoundSettings,
    Send,
    TakeSnapshot,
    View,
)
from swarm import averages
from swarm.digest import sha256
from swarm.errors import DivergedError, ProtocolError, SwarmError
from swarm.files import Kept
from swarm.log import canonical, check_reducers, parse_record, tokens_by_peer, verify_commit
from swarm.proto.round_pb2 import (
    Accept,
    Average,
    Commit,
    OpenRound,
    Prepare,
    Promise,
    Record,
    Refusal,
    RoundMessage,
    Vote,
)

MAX_BALLOT_STEP = 1000
"""a ballot further above the highest seen is refused: ballots must never run out"""
MAX_EARLY = 256
"""contributions and averages kept that overtook the opening of their attempt"""


class RoundMachine:
    def __init__(self, settings: RoundSettings, acceptor: Acceptor | None = None) -> None:
        self.settings = settings
        self.acceptor = acceptor or Acceptor()
        self.view = View()
        self.standing = Standing()
        """what leases allow now: the edge keeps it up to date, before each event"""
        self.attempt: Attempt | None = None
        self.finished = False
        self._leader = Leader(settings, self.acceptor.promised)
        self._early: list[tuple[bytes, Kept]] = []
        self.held = HeldParts(settings)
        self._to_accept: tuple[Ballot, Accept] | None = None
        self._decided: tuple[Commit, Record, tuple[bytes, ...]] | None = None

    # ---- events -------------------------------------------------------------------------------------------------

    def on_view(self, view: View, now: float) -> list[Action]:
        self.view = view
        return self._run(now)

    def on_tick(self, now: float) -> list[Action]:
        return self._run(now)

    def on_message(self, sender: bytes, message: RoundMessage, now: float) -> list[Action]:
        """A message for this round. A malformed or misplaced one raises `ProtocolError` and changes nothing."""
        out = Outbox(self.settings.me)
        self._handle(sender, message, now, out)
        return self._run(now, out)

    def on_snapshot(self, ballot: Ballot, offered: Offered, now: float) -> list[Action]:
        """Our own contribution is encoded."""
        out = Outbox(self.settings.me)
        if self.attempt is not None and self.attempt.ballot == ballot:
            self.attempt.offered = offered if offered.weight_tokens else None
            for part in range(len(self.attempt.open.parts)):
                reducer = self.attempt.reducer_of(part)
                if reducer == self.settings.me:
                    self.attempt.keep_own_contribution(part, offered)
                    continue
                message = self._message(ballot, contribution=self.attempt.contribution(part, offered))
                owed = offered.owed[part] if offered.owed else None
                out.send(reducer, message, offered.encoded[part] if offered.weight_tokens else None, owed)
        return self._run(now, out)

    def on_reduced(self, ballot: Ballot, average: Average, encoded: bytes, now: float) -> list[Action]:
        """A part of ours is averaged and encoded, once; no shares: nothing usable arrived.

        ``encoded`` goes beside ``average`` on its way out.
        """
        out = Outbox(self.settings.me)
        if self.attempt is not None and self.attempt.ballot == ballot:
            result, kept = self.attempt.result(average, encoded), None
            if average.shares:
                signed = averages.payload(self.attempt.opened, result)
                result.signature = average.signature = self.settings.sign_average(signed).signature
                kept = self.settings.keep(encoded)
                self.held.by_digest[result.digest] = kept
            self.attempt.averages[average.part] = result
            message = self._message(ballot, average=average)
            for member in self.attempt.members:
                if member != self.settings.me:
                    out.send(member, message, kept)
        return self._run(now, out)

    def on_fetched(self, digest: bytes, data: bytes | None, now: float) -> list[Action]:
        """The answer to a `Fetch`; ``data`` is verified by whoever fetched it. None is tried again later."""
        self.held.on_fetched(digest, data, now)
        return self._run(now)

    def on_unreachable(self, peer: bytes, now: float) -> list[Action]:
        """A message could not be delivered: do not wait for this peer in the current attempt."""
        if self.attempt is not None:
            self.attempt.unreachable.add(peer)
        return self._run(now)

    def on_ended(self, peer: bytes, now: float) -> list[Action]:
        """There is no way to this peer, or no such process any more: it is not asked in this round again."""
        self._leader.on_ended(peer, now)
        return self.on_unreachable(peer, now)

    def is_newest(self, ballot: Ballot) -> bool:
        """Whether ``ballot`` is that of the current attempt."""
        return self.attempt is not None and self.attempt.ballot == ballot

    def awaited(self) -> dict[bytes, float]:
        """Whom the current attempt, or our turn to lead, waits for, and since when: ask whether they still live."""
        if self._decided is not None:
            return {}
        awaited = dict.fromkeys(self._leader.awaited(self.view), self._leader.waits_since)
        if self.attempt is not None:
            awaited |= dict.fromkeys(self.attempt.awaited(), self.attempt.opened_at)
        return awaited

    def next_wakeup(self) -> float | None:
        """When `on_tick` is wanted at the latest; None: only an event can change something."""
        times = self.held.wakeups()
        if self._decided is None:
            times += self._leader.wakeups(self.view)
            if self.attempt is not None and self.attempt.is_waiting():
                times.append(self.attempt.deadline)
        return None if self.finished else min(times, default=None)

    # ---- the loop of decisions ----------------------------------------------------------------------------------

    def _run(self, now: float, out: Outbox | None = None) -> list[Action]:
        """Apply every rule until nothing changes; messages to oneself are delivered on the way."""
        out = out or Outbox(self.settings.me)
        while not self.finished:
            before = (len(out.actions), len(out.to_self))
            while out.to_self:
                self._handle(self.settings.me, out.to_self.pop(0), now, out)
            self._reduce_what_is_due(now, out)
            if self.settings.is_voter and self._decided is None:
                self._leader.standing = self.standing
                self._leader.step(now, self.view, self.attempt, out)
            self._accept_when_complete(now, out)
            self._apply_when_complete(now, out)
            if (len(out.actions), len(out.to_self)) == before and not out.to_self:
                break
        return out.actions

    def _handle(self, sender: bytes, message: RoundMessage, now: float, out: Outbox) -> None:
        if self.finished:
            return
        if (message.shard, message.round) != (self.settings.head.shard, self.settings.round):
            raise ProtocolError(f"a message for round {message.round} of shard {message.shard}")
        kind = message.WhichOneof("body")
        ballot = ballot_of(message.ballot)
        if ballot[0] > self._leader.seen[0] + MAX_BALLOT_STEP:
            raise ProtocolError(f"ballot {ballot[0]} is out of reach: the highest seen is {self._leader.seen[0]}")
        if kind == "prepare":
            self._on_prepare(sender, ballot, message.prepare, now, out)
        elif kind == "promise":
            self._leader.on_promise(sender, ballot, message.promise, self._check_record)
        elif kind == "open":
            self._on_open(sender, ballot, message.open, now, out)
        elif kind in ("contribution", "average"):
            self._on_bytes(sender, ballot, message)
        elif kind == "accept":
            self._on_accept(sender, ballot, message.accept, now, out)
        elif kind == "vote":
            self._leader.on_vote(message.vote)
        elif kind == "commit":
            self._on_commit(sender, message.commit)
        elif kind == "refusal":
            self._leader.on_refusal(sender, message.refusal, now)
        else:
            raise ProtocolError("a round message without a body")

    # ---- voter --------------------------------------------------------------------------------------------------

    def _on_prepare(self, sender: bytes, ballot: Ballot, message: Prepare, now: float, out: Outbox) -> None:
        self._check_leader(sender, ballot)
        if message.log_digest != self.settings.head.log_digest:
            raise ProtocolError("the ballot extends another log than ours")
        self._check_standing(message.gone)
        promised = self.acceptor.promise(ballot)
        if promised is None:
            return self._refuse(sender, out)
        self._leader.saw(ballot, now)
        answer = Promise()
        if promised.accepted != NO_BALLOT:
            answer.accepted_ballot.CopyFrom(to_message(promised.accepted))
            answer.accepted_record = promised.record
        self._persist(promised, {}, sender, self._message(ballot, promise=answer), out)

    def _on_accept(self, sender: bytes, ballot: Ballot, message: Accept, now: float, out: Outbox) -> None:
        self._check_leader(sender, ballot)
        if ballot < self.acceptor.promised:
            return self._refuse(sender, out)
        self._check_standing(message.gone)
        record = parse_record(message.record, self.settings.head)
        self._check_record(record)
        # Only from whoever opened the round. Another leader adopted what somebody may have accepted, and must be heard.
        if self.attempt is not None and self.attempt.ballot == ballot == ballot_of(record.opened_by):
            self.attempt.check_reducers(record)
        self._leader.saw(ballot, now)
        self.held.ask_anew()
        self._to_accept = (ballot, message)

    def _accept_when_complete(self, now: float, out: Outbox) -> None:
        if self._to_accept is None:
            return
        ballot, message = self._to_accept
        raw, gone = message.record, tuple(message.gone)
        record = parse_record(raw, self.settings.head)
        if not self.held.are_complete(record, (ballot[1], *message.holders[:64]), self.attempt, now, out):
            return
        self._to_accept = None
        if not self.standing.may_decide(self.settings.head, gone):
            return  # it was long in coming; the leader asks again
        accepted = self.acceptor.accept(ballot, raw)
        if accepted is None:
            return self._refuse(ballot[1], out)
        vote = Vote(
            shard=self.settings.head.shard,
            round=self.settings.round,
            ballot=to_message(ballot),
            record_digest=sha256(raw),
            gone=gone,
        )
        signed = self.settings.sign_vote(vote.SerializeToString())
        self._persist(accepted, self.held.of(record), ballot[1], self._message(ballot, vote=signed), out)

    def _persist(
        self, acceptor: Acceptor, parts: dict[bytes, Kept], to: bytes, answer: RoundMessage, out: Outbox
    ) -> None:
        """The answer leaves only when the state is on disk, also when it is an answer to ourselves."""
        self.acceptor = acceptor
        out.actions.append(Persist(acceptor, parts, (Send(to, answer),)))

    def _check_leader(self, sender: bytes, ballot: Ballot) -> None:
        if ballot[0] < 1 or ballot[1] != sender or sender not in self.settings.head.voters:
            raise ProtocolError("a ballot by somebody who may not lead this round")
        if not self.settings.is_voter:
            raise ProtocolError("we are no voter of this round")

    def _check_standing(self, gone: Sequence[bytes]) -> None:
        """Raise `ProtocolError` unless leases allow us to promise and vote in a ballot that goes on without these."""
        if self.settings.me in gone or not self.settings.head.may_be_gone(gone):
            raise ProtocolError("a ballot that declares voters gone who cannot be")
        if not self.standing.may_decide(self.settings.head, tuple(gone)):
            why = "some of whom it declares gone were heard" if gone else "our own ran out, and we are catching up"
            raise ProtocolError(f"leases do not allow us to vote in this ballot: {why}")

    def _check_record(self, record: Record) -> None:
        if record.state_digest != self.settings.state_digest:
            raise ProtocolError("the record starts from another state than ours")
        check_reducers(record, self.settings.head)
        if record.codec != self.settings.codec or sum(p.num_slices for p in record.parts) != self.settings.num_slices:
            raise ProtocolError("the record does not fit the run spec")
        for part in record.parts:
            expected = self.settings.part_size_bytes(part.first_slice, part.num_slices) if part.digest else 0
            if part.size_bytes != expected:
                raise ProtocolError(f"the record has a part of {part.size_bytes} bytes instead of {expected}")
        tokens = tokens_by_peer(record)
        if any(weight > self.settings.max_weight_tokens for weight in tokens.values()):
            raise ProtocolError("the record has a weight out of bounds")
        known = {*self.settings.head.voters, *self.settings.founders, *tokens}
        if not known.issuperset(record.next_voters):
            raise ProtocolError("the record names voters that had no part in the round")

    def _refuse(self, to: bytes, out: Outbox) -> None:
        refusal = Refusal(promised=to_message(self.acceptor.promised), reason="a higher ballot is promised")
        out.send(to, self._message(self.acceptor.promised, refusal=refusal))

    # ---- member and reducer -------------------------------------------------------------------------------------

    def _on_open(self, sender: bytes, ballot: Ballot, message: OpenRound, now: float, out: Outbox) -> None:
        if ballot[0] < 1 or ballot[1] != sender or sender not in self.settings.head.voters:
            raise ProtocolError("a round opened by somebody who may not lead it")
        if ballot < self._leader.seen:
            return self._refuse(sender, out) if self.settings.is_voter else None
        check_open(self.settings, message)
        if self.attempt is not None and self.attempt.ballot == ballot:
            return
        self._leader.saw(ballot, now)
        self.attempt = Attempt(self.settings, ballot, message, opened_at=now)
        self.held.drop_all_but(self._decided[1] if self._decided is not None else None)
        if self.settings.me in self.attempt.contributors:
            out.actions.append(TakeSnapshot(ballot, message))
        early, self._early = self._early, []
        for early_sender, kept in early:
            early_message = RoundMessage.FromString(kept[:])
            try:
                self._on_bytes(early_sender, ballot_of(early_message.ballot), early_message)
            except SwarmError:
                continue  # it could not be judged when it came; now it is refused without a witness

    def _on_bytes(self, sender: bytes, ballot: Ballot, message: RoundMessage) -> None:
        if self.attempt is None or ballot > self.attempt.ballot:
            self._keep_early(sender, ballot, message)
            return
        if ballot < self.attempt.ballot:
            return
        if message.WhichOneof("body") == "contribution":
            self.attempt.on_contribution(sender, message.contribution)
        else:
            digest = self.attempt.on_average(sender, message.average)
            if digest is not None:
                self.held.keep(digest, message.average.encoded)

    def _keep_early(self, sender: bytes, ballot: Ballot, message: RoundMessage) -> None:
        """Bytes may overtake the opening of their attempt; keep what known peers send, within bounds."""
        known = sender in self.settings.head.voters or any(sender == c.key for c in self.view.candidates)
        room = self.settings.round_bytes + (1 << 16)
        size = sum(len(kept) for _, kept in self._early) + message.ByteSize()
        if known and ballot >= self._leader.seen and len(self._early) < MAX_EARLY and size <= room:
            self._early.append((sender, self.settings.keep(message.SerializeToString())))

    def _reduce_what_is_due(self, now: float, out: Outbox) -> None:
        if self.attempt is not None:
            out.actions.extend(self.attempt.due_reductions(now))

    # ---- commit -------------------------------------------------------------------------------------------------

    def _on_commit(self, sender: bytes, commit: Commit) -> None:
        if self._decided is not None:
            return
        record, _ = verify_commit(self.settings.head, commit)
        if record.state_digest != self.settings.state_digest:
            raise DivergedError(
                f"round {record.round} starts from another state than ours",
                "join again: the state that the log proves is fetched",
            )
        self._decided = (canonical(commit, self.settings.head), record, (sender, *commit.holders[:64]))

    def _apply_when_complete(self, now: float, out: Outbox) -> None:
        if self._decided is None:
            return
        commit, record, holders = self._decided
        if self.held.are_complete(record, holders, self.attempt, now, out):
            out.actions.append(Apply(commit, record, self.held.of(record)))
            self.finished = True

    def _message(self, ballot: Ballot, **body: object) -> RoundMessage:
        return round_message(self.settings, ballot, **body)
