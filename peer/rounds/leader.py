"""A voter's part as leader of a round: when it takes over, what it opens, what it proposes, when a majority has voted.

Pure, like the round machine that owns it. A ballot is prepared first; if the promises name an accepted record it is
proposed again as it is, otherwise the round is opened for the members and the record says what they averaged.
"""

from __future__ import annotations

from collections.abc import Callable

from peer.rounds.attempt import Attempt
from peer.rounds.leases import Standing
from peer.rounds.paxos import NO_BALLOT, Ballot, Proposer, ballot_of, to_message
from peer.rounds.planning import choose_members, choose_voters, leader_order, spared, split_parts, takeover_rank
from peer.rounds.round_actions import Outbox, RoundSettings, View
from swarm.digest import sha256
from swarm.errors import ProtocolError
from swarm.log import parse_record, tokens_by_peer, verify_vote
from swarm.proto.common_pb2 import Signed
from swarm.proto.round_pb2 import (
    Accept,
    Commit,
    OpenRound,
    PartResult,
    Prepare,
    Promise,
    Record,
    Refusal,
    RoundMessage,
)

MAX_REFUSED_STEP = 1000
"""a refusal that tells of a ballot further up is not believed"""
MIN_BRANCH_REPLICAS = 2
"""a replica that hears of nobody else has lost its network, and trains on without deciding anything"""


class Leader:
    def __init__(self, settings: RoundSettings, promised: Ballot) -> None:
        self.settings = settings
        self.seen: Ballot = promised
        """the highest ballot that anybody was seen to lead"""
        self.standing = Standing()
        self._gone: tuple[bytes, ...] = ()
        """whom our ballot goes on without"""
        self._proposer: Proposer | None = None
        self._try_at: float | None = None
        self.waits_since = 0.0
        """when our turn to lead was last set"""
        self._resend_at = 0.0
        self._opened = False
        self._proposal: tuple[bytes, list[bytes]] | None = None
        self._votes: dict[bytes, Signed] = {}
        self._silent: set[bytes] = set()
        """members that were of no use to an earlier attempt of this round"""
        self._ended: set[bytes] = set()
        """who could not be reached at all in this round"""

    def saw(self, ballot: Ballot, now: float) -> None:
        """Somebody leads with ``ballot``: give it its time before taking over, in the order of ranks."""
        if ballot < self.seen:
            return
        self.seen = ballot
        if self._proposer is not None and self._proposer.ballot < ballot:
            self._give_up()
        if self.settings.is_voter:
            rank = takeover_rank(self._order(), self.settings.me, ballot[1])
            self.waits_since = now
            self._try_at = now + self.settings.reduce_timeout_s + rank * self.settings.takeover_timeout_s

    def awaited(self, view: View) -> set[bytes]:
        """Voters that lead, or may, before us: had they ended, it would be our turn."""
        waits = self._proposer is None and self._try_at is not None and self._may_lead(view)
        return set(self._ahead()) - self._ended if waits else set()

    def on_ended(self, peer: bytes, now: float) -> None:
        """``peer`` cannot be reached. Once whoever leads has ended, those who come before us and live have a turn each.

        Only once a round for each peer: two voters that cannot hear each other must not interrupt each other for ever.
        """
        if peer in self._ended:
            return
        self._ended.add(peer)
        ahead = self._ahead()
        nobody_leads = self.seen == NO_BALLOT or self.seen[1] in self._ended
        if peer in ahead and nobody_leads and self._proposer is None and self._try_at is not None:
            turns = sum(voter not in self._ended for voter in ahead)
            self._try_at = min(self._try_at, now + turns * self.settings.takeover_timeout_s)

    def wakeups(self, view: View) -> list[float]:
        times = []
        if self._try_at is not None and (self._proposer is not None or self._may_lead(view)):
            times.append(self._try_at)
        if self._proposer is not None:
            times.append(self._resend_at)
        return times

    def step(self, now: float, view: View, attempt: Attempt | None, out: Outbox) -> None:
        """Do the next thing that a leader, or a voter who should become one, does now."""
        if self._proposer is not None and now >= (self._try_at or 0.0):
            self._give_up()  # our own ballot took too long; a higher one follows
        if self._proposer is not None and not self.standing.may_decide(self.settings.head, self._gone):
            self._give_up()  # our leases ran out, or somebody whom we declared gone is back
        if self._proposer is None:
            self._take_over_when_due(now, view, out)
        elif self._proposal is not None:
            self._collect_votes(now, self._proposer, attempt, out)
        elif self._opened:
            if attempt is not None and attempt.ballot == self._proposer.ballot:
                self._propose_when_gathered(now, self._proposer, attempt, out)
        elif self._proposer.prepared:
            self._open_or_adopt(now, self._proposer, view, out)
        elif now >= self._resend_at:
            self._send_prepare(now, self._proposer, out)

    def on_promise(
        self, sender: bytes, ballot: Ballot, message: Promise, check_record: Callable[[Record], None]
    ) -> None:
        """Count a promise; one that tells of an impossible acceptance raises `ProtocolError` and does not count."""
        if self._proposer is None or self._proposer.ballot != ballot or sender not in self.settings.head.voters:
            return
        accepted = ballot_of(message.accepted_ballot)
        if accepted != NO_BALLOT:
            if accepted >= ballot or accepted[1] not in self.settings.head.voters:
                raise ProtocolError("a promise that tells of a ballot that cannot have been")
            check_record(parse_record(message.accepted_record, self.settings.head))
        self._proposer.on_promise(sender, accepted, message.accepted_record)
        if sender == self.settings.me:
            self._resend_at = 0.0  # our own promise is on disk: now the others may hear of the ballot

    def on_vote(self, signed: Signed) -> None:
        if self._proposer is None or self._proposal is None:
            return
        vote = verify_vote(signed, self.settings.head, sha256(self._proposal[0]))
        if ballot_of(vote.ballot) == self._proposer.ballot and tuple(vote.gone) == self._gone:
            self._votes[signed.signer] = signed

    def on_refusal(self, sender: bytes, message: Refusal, now: float) -> None:
        promised = ballot_of(message.promised)
        if self._proposer is None or sender not in self.settings.head.voters:
            return
        if self._proposer.ballot < promised and promised[0] <= self._proposer.ballot[0] + MAX_REFUSED_STEP:
            self.saw(promised, now)

    def _ahead(self) -> list[bytes]:
        """From whoever leads (or should, first) to the last voter before us."""
        if not self.settings.is_voter:
            return []
        order = self._order()
        start = order.index(self.seen[1]) if self.seen[1] in order else 0
        order = order[start:] + order[:start]
        return order[: order.index(self.settings.me)]

    def _may_lead(self, view: View) -> bool:
        gone = self.standing.gone(self.settings.head)
        if not self.settings.is_voter or not self.standing.may_decide(self.settings.head, gone):
            return False
        alone = bool(gone) and len(view.candidates) < MIN_BRANCH_REPLICAS
        return not alone and (view.ready or self.seen != NO_BALLOT)

    def _order(self) -> list[bytes]:
        gone = self.standing.gone(self.settings.head)
        order = leader_order(self.settings.head, self.settings.round)
        return [voter for voter in order if voter not in gone]

    def _take_over_when_due(self, now: float, view: View, out: Outbox) -> None:
        if not self._may_lead(view):
            return
        if self._try_at is None:
            self.waits_since = now
            rank = takeover_rank(self._order(), self.settings.me, None)
            self._try_at = now + rank * self.settings.takeover_timeout_s
        if now >= self._try_at:
            ballot = (self.seen[0] + 1, self.settings.me)
            gone = self._gone = self.standing.gone(self.settings.head)
            self._proposer = Proposer(ballot, lambda voters: self.settings.head.decides(voters, gone))
            self.saw(ballot, now)
            self._send_prepare(now, self._proposer, out)

    def _send_prepare(self, now: float, proposer: Proposer, out: Outbox) -> None:
        prepare = Prepare(log_digest=self.settings.head.log_digest, gone=self._gone)
        message = self._message(proposer.ballot, prepare=prepare)
        # Ourselves first, the others once our own promise is on disk: a ballot is never used twice, even after a crash.
        mine = self.settings.me
        asked = self._voters() if mine in proposer.promises else [mine]
        for voter in asked:
            if voter not in proposer.promises:
                out.send(voter, message)
        self._resend_at = now + self.settings.resend_s

    def _open_or_adopt(self, now: float, proposer: Proposer, view: View, out: Outbox) -> None:
        adopted = proposer.adopted()
        if adopted is not None:
            self._propose(adopted[0], adopted[1], now)
            return
        useful = [c for c in view.candidates if c.key not in self._silent | self._ended]
        members = choose_members(useful, self.settings.max_members, self.settings.me)
        if not any(member.contributes for member in members) or not view.ready:
            self._silent.clear()
            self._ended.clear()
            self._resend_at = now + self.settings.resend_s
            return
        bandwidth = {candidate.key: candidate.upload_bps for candidate in view.candidates}
        idle = spared(candidate for candidate in useful if any(candidate.key == m.peer_key for m in members))
        opened = OpenRound(
            log_digest=self.settings.head.log_digest,
            state_digest=self.settings.state_digest,
            members=members,
            parts=split_parts(members, bandwidth, self.settings.num_slices, idle),
        )
        self._opened = True
        self._resend_at = now + self.settings.reduce_timeout_s
        for member in members:
            out.send(member.peer_key, self._message(proposer.ballot, open=opened))

    def _propose_when_gathered(self, now: float, proposer: Proposer, attempt: Attempt, out: Outbox) -> None:
        # A reducer that waited for a silent member averages at its own deadline; its average then has as long again.
        give_up_waiting_at = attempt.deadline + self.settings.reduce_timeout_s / 2
        if not attempt.is_gathered() and now < give_up_waiting_at:
            self._resend_at = give_up_waiting_at
            return
        self._silent |= attempt.silent() - {self.settings.me}
        results = attempt.results()
        if not any(part.digest for part in results):
            self._give_up()
            return
        holders = [key for key in attempt.members if key not in attempt.unreachable]
        self._propose(self._record(results, attempt, proposer), holders, now)

    def _record(self, results: list[PartResult], attempt: Attempt, proposer: Proposer) -> bytes:
        record = attempt.opened
        record.parts.extend(results)
        tokens = tokens_by_peer(record)
        record.total_tokens = self.settings.head.total_tokens + sum(tokens.values())
        present = ((set(tokens) | set(proposer.promises)) & set(attempt.members)) - attempt.unreachable
        present.add(self.settings.me)
        voters = choose_voters(present, self.settings.founders, self.settings.head.voters, self.settings.round)
        record.next_voters.extend(voters)
        return record.SerializeToString(deterministic=True)

    def _propose(self, record: bytes, holders: list[bytes], now: float) -> None:
        self._proposal = (record, holders[:64])
        self._votes = {}
        self._resend_at = now

    def _collect_votes(self, now: float, proposer: Proposer, attempt: Attempt | None, out: Outbox) -> None:
        if self._proposal is None:
            return
        record, holders = self._proposal
        if self.settings.head.decides(self._votes, self._gone):
            votes = [self._votes[key] for key in sorted(self._votes)]
            message = self._message(proposer.ballot, commit=Commit(record=record, votes=votes, holders=holders))
            members = attempt.members if attempt is not None else []
            for peer in dict.fromkeys([*members, *self.settings.head.voters]):
                out.send(peer, message)
            self._give_up()
        elif now >= self._resend_at:
            message = self._message(proposer.ballot, accept=Accept(record=record, holders=holders, gone=self._gone))
            for voter in self._voters():
                if voter not in self._votes:
                    out.send(voter, message)
            self._resend_at = now + self.settings.resend_s

    def _voters(self) -> list[bytes]:
        """Whose votes are wanted: nobody else's where our own decides."""
        head, me = self.settings.head, self.settings.me
        return [me] if head.decides([me], self._gone) else [v for v in head.voters if v not in self._gone]

    def _give_up(self) -> None:
        self._proposer = None
        self._proposal = None
        self._opened = False

    def _message(self, ballot: Ballot, **body: object) -> RoundMessage:
        return round_message(self.settings, ballot, **body)


def round_message(settings: RoundSettings, ballot: Ballot, **body: object) -> RoundMessage:
    """A message of this round with one body, named as in protos/round.proto."""
    return RoundMessage(
        shard=settings.head.shard,
        round=settings.round,
        ballot=to_message(ballot),
        **body,  # type: ignore[arg-type]
    )
