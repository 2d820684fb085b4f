"""The log of a shard: which commits prove themselves, given the one before.

Pure: a head and a commit in, the next head out, or a named error. A commit is valid when it extends the head's log
digest, names the right round, and carries votes of one ballot by a majority of the voters that the head names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from swarm import digest
from swarm.errors import ProtocolError, SignatureError, VerificationError
from swarm.identity import PUBLIC_KEY_BYTES, verify
from swarm.proto.common_pb2 import Genesis, Signed
from swarm.proto.round_pb2 import Commit, PartResult, Record, Rejection, Share, Vote

GENESIS_CONTEXT = "genesis"
VOTE_CONTEXT = "vote"
MAX_VOTERS = 7
MAX_PARTS = 64
MAX_MEMBERS = 64
MAX_RECORD_BYTES = 512 * 1024
MAX_VOTE_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHead:
    """Where a shard's log stands after ``round``, and who decides the next round."""

    run_id: bytes
    shard: int
    round: int
    log_digest: bytes
    voters: tuple[bytes, ...]
    total_tokens: int

    @property
    def majority(self) -> int:
        return len(self.voters) // 2 + 1


def parse_genesis(signed: Signed, run_id: bytes, organizer_key: bytes, num_shards: int) -> Genesis:
    """The genesis of this run, once its organizer's signature is right."""
    payload = verify(signed, GENESIS_CONTEXT, run_id, organizer_key)
    try:
        genesis = Genesis.FromString(payload)
    except DecodeError as error:
        raise ProtocolError("the genesis cannot be read") from error
    if genesis.run_id != run_id or len(genesis.shards) != num_shards:
        raise ProtocolError("the genesis belongs to another run")
    _check_voters(genesis.voters)
    if any(len(shard.state_digest) != digest.DIGEST_BYTES or shard.num_values < 1 for shard in genesis.shards):
        raise ProtocolError("the genesis names no state")
    return genesis


def genesis_head(genesis: Genesis, shard: int) -> LogHead:
    return LogHead(
        run_id=genesis.run_id,
        shard=shard,
        round=0,
        log_digest=digest.log_genesis(genesis.run_id, shard),
        voters=tuple(genesis.voters),
        total_tokens=0,
    )


def parse_record(raw: bytes, head: LogHead) -> Record:
    """The record in ``raw``, once it is well formed and extends ``head``."""
    if len(raw) > MAX_RECORD_BYTES:
        raise ProtocolError(f"a record of {len(raw)} bytes is too large")
    try:
        record = Record.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("a record cannot be read") from error
    if (record.shard, record.round) != (head.shard, head.round + 1):
        raise ProtocolError(
            f"a record of shard {record.shard} round {record.round} cannot follow shard {head.shard} round {head.round}"
        )
    if record.log_digest != head.log_digest:
        raise VerificationError(f"round {record.round}: the record extends another log than ours")
    _check_voters(record.next_voters)
    _check_parts(record.parts)
    if record.total_tokens != head.total_tokens + sum(tokens_by_peer(record).values()):
        raise ProtocolError(f"round {record.round}: its tokens do not add up")
    return record


def tokens_by_peer(record: Record) -> dict[bytes, int]:
    """Tokens that each contributor is credited with: its largest weight in any present part."""
    tokens: dict[bytes, int] = {}
    for part in record.parts:
        for share in part.shares:
            tokens[share.peer_key] = max(tokens.get(share.peer_key, 0), share.weight_tokens)
    return tokens


def check_verdicts(shares: Sequence[Share], rejections: Sequence[Rejection]) -> None:
    """Raise `ProtocolError` unless each contributor of a part is named once, and all figures are possible ones."""
    keys = [*(share.peer_key for share in shares), *(rejection.peer_key for rejection in rejections)]
    if len(keys) > MAX_MEMBERS or any(len(key) != PUBLIC_KEY_BYTES for key in keys):
        raise ProtocolError("a part has too many contributors, or a contributor's key has a wrong length")
    if len(set(keys)) != len(keys):
        raise ProtocolError("a part counts one contributor twice")
    # Comparisons that are false for NaN.
    if not all(0 <= share.clipped_to <= 1 for share in shares):
        raise ProtocolError("a part clips a contribution to an impossible share of its norm")
    if not all(-1 <= r.cosine < r.min_cosine <= 1 for r in rejections):
        raise ProtocolError("a part rejects a contribution for an impossible cosine")


def verify_vote(signed: Signed, head: LogHead, record_digest: bytes | None = None) -> Vote:
    """The vote inside ``signed``, once one of the head's voters cast it for the next round."""
    if signed.signer not in head.voters:
        raise SignatureError("a vote by somebody who is no voter of this round")
    if len(signed.payload) > MAX_VOTE_BYTES:
        raise ProtocolError(f"a vote of {len(signed.payload)} bytes is too large")
    try:
        vote = Vote.FromString(verify(signed, VOTE_CONTEXT, head.run_id))
    except DecodeError as error:
        raise ProtocolError("a vote cannot be read") from error
    if (vote.shard, vote.round) != (head.shard, head.round + 1):
        raise ProtocolError(f"a vote for round {vote.round} instead of {head.round + 1}")
    if record_digest is not None and vote.record_digest != record_digest:
        raise ProtocolError("a vote for another record")
    return vote


def canonical(commit: Commit) -> Commit:
    """``commit`` reduced to its proof: the record and the votes of one ballot's majority. It must verify."""
    ballots: dict[tuple[int, bytes], dict[bytes, Signed]] = {}
    for signed in commit.votes:
        ballot = Vote.FromString(signed.payload).ballot
        ballots.setdefault((ballot.number, ballot.leader), {})[signed.signer] = signed
    votes = max(ballots.items(), key=lambda item: (len(item[1]), item[0]))[1]
    return Commit(
        record=commit.record,
        votes=[
            Signed(signer=signer, payload=votes[signer].payload, signature=votes[signer].signature)
            for signer in sorted(votes)
        ],
    )


def verify_commit(head: LogHead, commit: Commit) -> tuple[Record, LogHead]:
    """The record that ``commit`` proves, and the head after it."""
    record = parse_record(commit.record, head)
    if len(commit.votes) > MAX_VOTERS:
        raise ProtocolError("a commit with too many votes")
    record_digest = digest.sha256(commit.record)
    ballots: dict[tuple[int, bytes], set[bytes]] = {}
    for signed in commit.votes:
        vote = verify_vote(signed, head, record_digest)
        ballots.setdefault((vote.ballot.number, vote.ballot.leader), set()).add(signed.signer)
    if max((len(signers) for signers in ballots.values()), default=0) < head.majority:
        raise VerificationError(f"round {record.round}: no majority of its voters signed the commit")
    return record, next_head(head, commit.record, record)


def next_head(head: LogHead, raw: bytes, record: Record) -> LogHead:
    return replace(
        head,
        round=record.round,
        log_digest=digest.extend_log(head.log_digest, raw),
        voters=tuple(record.next_voters),
        total_tokens=record.total_tokens,
    )


def _check_voters(voters: Sequence[bytes]) -> None:
    if not 1 <= len(voters) <= MAX_VOTERS or len(set(voters)) != len(voters):
        raise ProtocolError(f"{len(voters)} voters instead of 1 to {MAX_VOTERS} different ones")
    if any(len(voter) != PUBLIC_KEY_BYTES for voter in voters):
        raise ProtocolError("a voter's key has a wrong length")


def _check_parts(parts: Sequence[PartResult]) -> None:
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ProtocolError(f"{len(parts)} parts instead of 1 to {MAX_PARTS}")
    expected = 0
    for part in parts:
        if part.first_slice != expected or part.num_slices < 1:
            raise ProtocolError("the parts of a record do not cover the shard once")
        expected += part.num_slices
        if part.digest and (len(part.digest) != digest.DIGEST_BYTES or not 1 <= len(part.shares) <= MAX_MEMBERS):
            raise ProtocolError("a part of a record names no digest or no contributors")
        if not part.digest and (part.shares or part.rejections):
            raise ProtocolError("an absent part names contributors")
        check_verdicts(part.shares, part.rejections)
    if not any(part.digest for part in parts):
        raise ProtocolError("a record in which every part is absent")
