"""Another branch of our log: who may stand on one, where it leaves ours, and whether it is to be followed.

Decides from statuses (hints), then from commits that prove themselves. What is given up for it, and how, is
`peer.rounds.mending`'s. See docs/decisions/0013.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from peer.p2p.transport import Transport
from peer.rounds.catch_up import COMMITS_PER_PAGE, fetch_commits
from peer.rounds.ledger import Ledger
from swarm import schedule
from swarm.errors import ProtocolError, VerificationError
from swarm.log import LogHead, canonical, tokens_by_peer, verify_commit
from swarm.proto.round_pb2 import Commit, Status
from swarm.run_spec import RunSpec

MAX_FORK_ROUNDS = 4096
"""older rounds are never given up, and a branch of more rounds is not read: nobody rewrites a whole run"""
MAX_BRANCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A proven log that is to be followed instead of ours, from ``fork`` on."""

    fork: LogHead
    tail: tuple[tuple[Commit, LogHead], ...]
    """its commits after the fork, each with the head after it"""
    instead_of: LogHead
    """our head when it was found"""

    @property
    def head(self) -> LogHead:
        return self.tail[-1][1]


def standing_apart(statuses: Mapping[bytes, Status], ledger: Ledger, apart: set[bytes]) -> list[bytes]:
    """Peers that say that they stand on another branch with more behind it, most first.

    ``apart``: peers further on whose commits did not follow ours.
    """
    found = []
    for peer, status in statuses.items():
        number = status.round - 1
        other = ledger.heads[number].log_digest != status.log_digest if number <= ledger.head.round else peer in apart
        theirs = replace(ledger.head, total_tokens=status.committed_tokens, log_digest=status.log_digest)
        if other and ledger.head.is_behind(theirs):
            found.append((-status.committed_tokens, status.log_digest, peer))
    return [peer for _, _, peer in sorted(found)]


async def fetch_branch(transport: Transport, holder: bytes, ledger: Ledger, spec: RunSpec) -> Branch | None:
    """What ``holder`` has instead of our newest commits, verified; None where ours is the one to follow.

    Raises `NetworkError` and `VerificationError`.
    """
    ours, shard = ledger.head, ledger.head.shard
    first, page = ours.round + 1, dict[int, Commit]()
    while first > 1 and not _is_ours(ledger, first, page):
        if ours.round - first > MAX_FORK_ROUNDS:
            raise VerificationError("a branch that leaves our log too long ago")
        first = max(1, first - COMMITS_PER_PAGE // 2)
        page = await fetch_commits(transport, holder, shard, first)
    fork = first - 1
    while _is_ours(ledger, fork + 1, page):
        fork += 1
    if fork == ours.round:
        return None  # it goes on where we end: that is caught up with
    head, tail, size = ledger.heads[fork], list[tuple[Commit, LogHead]](), 0
    while page:
        while commit := page.get(head.round + 1):
            kept = canonical_within_bounds(commit, head, spec)
            size += kept.ByteSize()
            if len(tail) >= MAX_FORK_ROUNDS or size > MAX_BRANCH_BYTES:
                raise VerificationError("a branch that is too long to be read")
            head = verify_commit(head, kept)[1]
            tail.append((kept, head))
        page = await fetch_commits(transport, holder, shard, head.round + 1)
    if not tail or not ours.is_behind(head):
        return None
    return Branch(fork=ledger.heads[fork], tail=tuple(tail), instead_of=ours)


def canonical_within_bounds(commit: Commit, head: LogHead, spec: RunSpec) -> Commit:
    """The proof in ``commit``, in which nobody counts for more than a round allows."""
    record, _ = verify_commit(head, commit)
    allowed = schedule.max_weight_tokens(spec.rounds, record.round)
    if any(weight > allowed for weight in tokens_by_peer(record).values()):
        raise ProtocolError(f"round {record.round}: a weight out of bounds")
    return canonical(commit, head)


def _is_ours(ledger: Ledger, number: int, page: Mapping[int, Commit]) -> bool:
    """Whether ``page`` has our commit of this round."""
    if number not in page or number > ledger.head.round:
        return False
    return bool(ledger.commits(number, 1)[0].record == page[number].record)
