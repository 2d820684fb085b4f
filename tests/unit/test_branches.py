"""Another branch: who may stand on one, and which of two logs is followed, however its holder lies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from peer.rounds import branches
from peer.rounds.branches import Branch, fetch_branch, standing_apart
from peer.rounds.ledger import Ledger
from peer.rounds.mending import describe, heir
from swarm.digest import sha256
from swarm.errors import SwarmError, VerificationError
from swarm.identity import peer_id_of
from swarm.log import VOTE_CONTEXT, LogHead
from swarm.proto.round_pb2 import Ballot, Commit, LogReply, LogRequest, Record, Status, Vote
from tests.unit.test_ledger import RUN_ID, VOTER, branch_after, commit_after, fill, open_ledger
from tests.unit.test_shard import SPEC


class Holder:
    """A transport on whose other side one peer serves ``commits`` of round 1 on, as it likes."""

    def __init__(self, commits: list[Commit]) -> None:
        self.commits = commits
        self.pages = 0

    async def call(self, peer: bytes, method: str, request: bytes, **options: object) -> bytes:
        self.pages += 1
        wanted = LogRequest.FromString(request)
        page = self.commits[wanted.first_round - 1 :][: wanted.max_commits]
        return LogReply(commits=page).SerializeToString()


def find(ledger: Ledger, holder: Holder) -> Branch | None:
    return asyncio.run(fetch_branch(holder, b"h" * 32, ledger, SPEC))  # type: ignore[arg-type]


def other_log(ledger: Ledger, fork_round: int, rounds: int) -> list[Commit]:
    _, tail = branch_after(ledger, fork_round, rounds)
    return [*ledger.commits(1, fork_round), *(commit for commit, _ in tail)]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """200 rounds, which no test changes."""
    ledger = open_ledger(tmp_path_factory.mktemp("ledger"))
    fill(ledger, 200)
    return ledger


@pytest.mark.parametrize("fork_round", [0, 1, 60, 137, 199])
def test_a_longer_branch_is_read_from_where_it_leaves_our_log(ledger: Ledger, fork_round: int) -> None:
    """However far back that is, and however many pages it takes; the incident names both sides."""
    branch = find(ledger, Holder(other_log(ledger, fork_round, 230 - fork_round)))
    assert branch is not None
    assert branch.fork == ledger.heads[fork_round] and branch.instead_of == ledger.head
    assert (branch.head.round, len(branch.tail)) == (230, 230 - fork_round)
    incident = describe(branch, ledger, 1)
    assert (incident.fork_round, incident.lost.round, incident.kept.round) == (fork_round, 200, 230)
    assert incident.lost.signers == incident.kept.signers == (peer_id_of(VOTER.public_key),)
    assert incident.offered_by == peer_id_of(heir(branch, ledger))


@pytest.mark.parametrize(
    ("case", "fork_round", "rounds"),
    [("fewer tokens", 100, 99), ("our own log", 200, 0), ("what comes after ours", 200, 5), ("a shorter log", 150, 0)],
)
def test_what_is_no_better_branch_is_not_followed(ledger: Ledger, case: str, fork_round: int, rounds: int) -> None:
    assert find(ledger, Holder(other_log(ledger, fork_round, rounds))) is None, case


def test_of_as_many_tokens_the_lower_digest_is_followed(ledger: Ledger) -> None:
    """By everybody, so that two branches never swap."""
    commits = other_log(ledger, 100, 100)
    head = branch_after(ledger, 100, 100)[1][-1][1]
    assert (find(ledger, Holder(commits)) is not None) == (head.log_digest < ledger.head.log_digest)


def _forged(commits: list[Commit], ledger: Ledger) -> None:
    commits[150].votes[0].signature = bytes(64)


def _without_a_commit(commits: list[Commit], ledger: Ledger) -> None:
    del commits[150]


def _heavy(commits: list[Commit], ledger: Ledger) -> None:
    """One commit that claims more tokens than a round can have."""
    del commits[101:]
    commit, _ = commit_after(ledger.heads[100], b"heavy")
    record = Record.FromString(commit.record)
    record.parts[0].shares[0].weight_tokens = 10**9
    record.total_tokens = ledger.heads[100].total_tokens + 10**9
    commits[100] = signed(record)


def signed(record: Record) -> Commit:
    raw = record.SerializeToString()
    vote = Vote(
        shard=0,
        round=record.round,
        ballot=Ballot(number=1, leader=VOTER.public_key),
        record_digest=sha256(raw),
    )
    return Commit(record=raw, votes=[VOTER.sign(VOTE_CONTEXT, RUN_ID, vote.SerializeToString())])


@pytest.mark.parametrize("change", [_forged, _without_a_commit, _heavy])
def test_a_branch_that_does_not_prove_itself_is_refused(
    ledger: Ledger, change: Callable[[list[Commit], Ledger], None]
) -> None:
    commits = other_log(ledger, 100, 130)
    change(commits, ledger)
    with pytest.raises(SwarmError):
        find(ledger, Holder(commits))


def test_rounds_of_long_ago_are_not_given_up(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody rewrites a whole run; and what is asked for before that is known is bounded."""
    monkeypatch.setattr(branches, "MAX_FORK_ROUNDS", 90)
    holder = Holder(other_log(ledger, 10, 250))
    with pytest.raises(VerificationError, match="too long ago"):
        find(ledger, holder)
    assert holder.pages <= 3


def test_a_branch_without_end_is_not_read_for_ever(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "MAX_FORK_ROUNDS", 150)
    with pytest.raises(VerificationError, match="too long to be read"):
        find(ledger, Holder(other_log(ledger, 190, 160)))


def status(head: LogHead, **changes: object) -> Status:
    told = Status(round=head.round + 1, log_digest=head.log_digest, committed_tokens=head.total_tokens)
    told.MergeFrom(Status(**changes))  # type: ignore[arg-type]
    return told


def test_who_stands_apart_is_asked_by_what_it_claims_and_nobody_else(ledger: Ledger) -> None:
    """The same log, an older head, fewer tokens: nothing to ask; further on only where its commits did not follow."""
    ours = ledger.head
    statuses = {
        b"same": status(ours),
        b"older": status(ledger.heads[150]),
        b"less": status(ledger.heads[150], log_digest=b"o" * 32),
        b"more": status(ours, log_digest=b"o" * 32, committed_tokens=ours.total_tokens + 5),
        b"most": status(ledger.heads[150], log_digest=b"o" * 32, committed_tokens=ours.total_tokens + 9),
        b"ahead": status(ours, round=ours.round + 9, log_digest=b"a" * 32, committed_tokens=ours.total_tokens + 99),
    }
    assert standing_apart(statuses, ledger, set()) == [b"most", b"more"]
    assert standing_apart(statuses, ledger, {b"ahead"}) == [b"ahead", b"most", b"more"]
