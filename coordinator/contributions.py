"""The record of the run: commits that prove themselves, who contributed, and how far the run is.

Decides which commits are recorded; leaves the rule of validity to `swarm.log`. The coordinator believes no peer about
contributions: they follow from the signed log. `Ledger.record` runs on the writer's thread only; `progress` anywhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.message import DecodeError

from coordinator import incidents
from coordinator.run import Run
from coordinator.store import Losses, NewCommit, PeerRow, RoundRow, Store
from swarm import digest, log
from swarm.errors import ConfigError, EarlierVersion, ProtocolError, VerificationError
from swarm.log import LogHead
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.round_pb2 import Commit, Record, Share

# A branch is taken whole or not at all, so this is how far back a fork may lie, if 16 MiB hold its commits.
MAX_COMMITS_PER_REQUEST = 1024
MAX_ROUNDS_SHOWN = 1000
MAX_PEERS_SHOWN = 1000
MAX_TOKENS = 2**63 - 1
LIVE_S = 60
"""peers report six times as often"""
_REPLAY_COMMITS = 64
_logger = logging.getLogger(__name__)


class Ledger:
    """The recorded log of a shard; ``head`` is where it stands."""

    def __init__(self, run: Run, store: Store, shard: int = 0) -> None:
        """Rebuild the head from ``store``; `ConfigError` where the recorded chain is broken."""
        self._genesis = log.genesis_head(run.genesis, shard)
        self._shard = shard
        self._store = store
        self.head = _replay(self._genesis, store)

    @property
    def next_round_wanted(self) -> int:
        return self.head.round + 1

    def record(self, commits: Sequence[Commit], now_unix_ms: int) -> int:
        """Record consecutive commits, all or none; those recorded already change nothing.

        Commits of another branch, from the fork on, take the place of the recorded ones where more tokens are behind
        them (`LogHead.is_behind`), as among peers; either way that is an incident. Returns the first round whose commit
        is wanted next. Raises `ProtocolError`, `SignatureError` and `VerificationError` for commits that do not prove
        themselves, or that are of the branch that is not followed.
        """
        if len(commits) > MAX_COMMITS_PER_REQUEST:
            raise ProtocolError(f"{len(commits)} commits in a request; at most {MAX_COMMITS_PER_REQUEST}")
        head, fork = self.head, None
        new: list[NewCommit] = []
        for commit in commits:
            number = _round_of(commit)
            if fork is None and number <= self.head.round:
                if self._is_recorded(number, commit):
                    continue
                head = fork = self._head_before(number)
            record, head = log.verify_commit(head, commit)
            new.append(_new_commit(commit, record, head, now_unix_ms))
        if fork is not None:
            self._change_branch(fork, head, new)
        elif new:
            self._store.append(new)
            self.head = head
        return self.next_round_wanted

    def _is_recorded(self, number: int, commit: Commit) -> bool:
        recorded = self._store.round(self._shard, number)
        return recorded is not None and recorded.record_digest == digest.sha256(commit.record)

    def _change_branch(self, fork: LogHead, head: LogHead, new: Sequence[NewCommit]) -> None:
        followed = self.head.is_behind(head)
        kept, given_up = (head, self.head) if followed else (self.head, head)
        text = (
            f"round {fork.round + 1} was decided twice; the branch to round {kept.round} (log digest"
            f" {kept.log_digest.hex()}, {kept.total_tokens} tokens) is followed, that to round {given_up.round}"
            f" ({given_up.log_digest.hex()}, {given_up.total_tokens} tokens) is not"
        )
        _logger.error("incident: %s", text)
        incidents.tell(self._store, f"branches after round {fork.round}", text, new[0].row.recorded_unix_ms)
        if not followed:
            raise VerificationError(
                f"round {fork.round + 1} is recorded with another result: the swarm has split",
                "peers of this branch follow the other by themselves once they hear of it",
            )
        self._store.replace_from(fork.round + 1, new)
        self.head = head

    def _head_before(self, number: int) -> LogHead:
        row, raw = self._store.round(self._shard, number - 1), self._store.commit(self._shard, number - 1)
        if row is None or raw is None:
            return self._genesis
        record = Record.FromString(Commit.FromString(raw).record)
        return replace(
            self._genesis,
            round=row.round,
            log_digest=row.log_digest,
            voters=tuple(record.next_voters),
            total_tokens=row.total_tokens,
        )


def ledger_of(ledgers: Sequence[Ledger], commits: Sequence[Commit]) -> Ledger:
    """The log that ``commits`` belong to: all of one shard, or `Ledger.record` refuses them. The first for none."""
    shard = _read_record(commits[0]).shard if commits else 0
    if shard >= len(ledgers):
        raise ProtocolError(f"a commit of shard {shard}; the run has {len(ledgers)}")
    return ledgers[shard]


def progress(run: Run, heads: Sequence[LogHead], store: Store, now_unix_ms: int) -> pb.GetProgressReply:
    """How far the run is: newest rounds in order, and the peers heard from most recently.

    ``heads``: of every shard. Losses and rounds are told by the first one's; the others follow it.
    """
    head, number = heads[0], min(head.round for head in heads)
    rounds = [row for row in store.newest_rounds(0, MAX_ROUNDS_SHOWN) if row.round <= head.round]
    first, last = (rounds[0].round, rounds[-1].round) if rounds else (0, 0)
    losses = store.losses(first, last)
    initial = store.losses(0, 0).get(0)
    shares = store.shares(0, first, last)
    committed = head.total_tokens if number == head.round else _total_tokens(store, number)
    peers = store.newest_peers(MAX_PEERS_SHOWN)
    shards = shard_progress(heads, peers, now_unix_ms)
    return pb.GetProgressReply(
        name=run.spec.name,
        round=number,
        total_tokens=committed,
        target_tokens=run.spec.total_tokens,
        rounds=[_round_progress(row, losses.get(row.round), shares.get(row.round, {})) for row in rounds],
        peers=[_peer_progress(row, len(heads)) for row in peers],
        initial_validation_loss=number_or_nan(initial.validation if initial else None),
        shards=shards,
        tokens_per_s=shards[0].tokens_per_s,
    )


def shard_progress(heads: Sequence[LogHead], peers: Sequence[PeerRow], now_unix_ms: int) -> list[pb.ShardProgress]:
    """How far each shard is, and who trains it: peers heard lately that did not say that they leave."""
    live = [row for row in peers if not row.leaving and now_unix_ms - row.last_seen_unix_ms <= LIVE_S * 1000]
    found = []
    for shard, head in enumerate(heads):
        replicas = [row for row in live if row.trains(shard)]
        found.append(
            pb.ShardProgress(
                round=head.round,
                total_tokens=head.total_tokens,
                replicas=len(replicas),
                tokens_per_s=sum(row.shard_tokens_per_s[shard - row.first_shard] for row in replicas),
                service_tokens_per_s=sum(row.service_tokens_per_s for row in replicas),
            )
        )
    return found


def _total_tokens(store: Store, number: int) -> int:
    row = store.round(0, number)
    return row.total_tokens if row is not None else 0


def number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _replay(head: LogHead, store: Store) -> LogHead:
    """The head after every recorded commit. Votes were verified when recorded; the hash chain is checked again."""
    while found := store.commits(head.shard, head.round + 1, _REPLAY_COMMITS):
        for number, raw in found:
            try:
                commit = Commit.FromString(raw)
                head = log.next_head(head, commit.record, log.parse_record(commit.record, head))
            except EarlierVersion as error:
                raise EarlierVersion(f"round {number} in the database was {error}") from error
            except (DecodeError, VerificationError) as error:
                raise ConfigError(
                    f"the database is damaged at round {number}: {error}", "restore it from a backup"
                ) from error
    return head


def _round_of(commit: Commit) -> int:
    return _read_record(commit).round


def _read_record(commit: Commit) -> Record:
    if len(commit.record) > log.MAX_RECORD_BYTES:
        raise ProtocolError(f"a record of {len(commit.record)} bytes is too large")
    try:
        return Record.FromString(commit.record)
    except DecodeError as error:
        raise ProtocolError("a record cannot be read") from error


def _new_commit(commit: Commit, record: Record, head: LogHead, now_unix_ms: int) -> NewCommit:
    if len(commit.holders) > log.MAX_MEMBERS or head.total_tokens > MAX_TOKENS:
        raise ProtocolError(f"round {record.round}: too many holders or tokens")
    row = RoundRow(
        shard=record.shard,
        round=record.round,
        record_digest=digest.sha256(commit.record),
        state_digest=record.state_digest,
        log_digest=head.log_digest,
        total_tokens=head.total_tokens,
        absent_parts=sum(1 for part in record.parts if not part.digest),
        recorded_unix_ms=now_unix_ms,
    )
    return NewCommit(row=row, commit=commit.SerializeToString(), tokens=log.tokens_by_peer(record))


def _round_progress(row: RoundRow, losses: Losses | None, shares: dict[bytes, int]) -> pb.RoundProgress:
    return pb.RoundProgress(
        round=row.round,
        total_tokens=row.total_tokens,
        validation_loss=number_or_nan(losses.validation if losses else None),
        train_loss=number_or_nan(losses.train if losses else None),
        shares=[Share(peer_key=key, weight_tokens=tokens) for key, tokens in shares.items()],
        absent_parts=row.absent_parts,
        recorded_unix_ms=row.recorded_unix_ms,
        state_digest=row.state_digest,
    )


def _peer_progress(row: PeerRow, num_shards: int) -> pb.PeerProgress:
    return pb.PeerProgress(
        peer_key=row.key,
        round=row.round,
        state_digest=row.state_digest,
        tokens=row.tokens // num_shards,
        bytes_sent=row.bytes_sent,
        bytes_received=row.bytes_received,
        tokens_per_s=row.tokens_per_s,
        last_seen_unix_ms=row.last_seen_unix_ms,
        leaving=row.leaving,
        device=row.device,
        log_digest=row.log_digest,
        first_shard=row.first_shard,
        num_shards=row.num_shards,
        service_tokens_per_s=row.service_tokens_per_s,
    )
