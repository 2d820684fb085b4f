"""The log of a shard: which commits prove themselves, given the one before.

Pure: a head and a commit in, the next head out, or a named error. A commit is valid when it extends the head's log
digest, names the right round, and carries votes of one ballot by a majority of the voters that the head names, or of
those whom the votes do not declare gone (docs/decisions/0013).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from swarm import averages, digest
from swarm.errors import EarlierVersion, ProtocolError, SignatureError, VerificationError
from swarm.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, verify
from swarm.proto.common_pb2 import Genesis, Signed
from swarm.proto.round_pb2 import Commit, PartResult, Record, Rejection, Share, Vote

GENESIS_CONTEXT = "genesis"
VOTE_CONTEXT = "vote"
PROTOCOL_VERSION = 2
"""of records; 1: averages without their reducers' signatures"""
MAX_VOTERS = 7
# Fewer voters than this: founders outweigh the others.
SMALL_SWARM = 5
MAX_PARTS = 64
MAX_MEMBERS = 64
MAX_CODEC_BYTES = 16
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
    founders: tuple[bytes, ...] = ()
    """the voters that the genesis names"""

    def decides(self, signers: Collection[bytes], gone: Collection[bytes] = ()) -> bool:
        """Whether ``signers`` are a majority of the voters but for those who are ``gone``."""
        weights = {voter: self.weight(voter) for voter in self.voters if voter not in gone}
        return 2 * sum(weight for voter, weight in weights.items() if voter in signers) > sum(weights.values())

    def may_be_gone(self, gone: Sequence[bytes]) -> bool:
        """Whether a ballot may name these, in order, as gone: there is a rest, and it cannot decide otherwise."""
        rest = set(self.voters) - set(gone)
        known = list(gone) == sorted(set(gone) & set(self.voters))
        return not gone or (known and bool(rest) and not self.decides(rest))

    def weight(self, voter: bytes) -> int:
        """1; in a small swarm a founder weighs as much as all who are none, and one more."""
        others = len(set(self.voters) - set(self.founders))
        return 1 + others if len(self.voters) < SMALL_SWARM and voter in self.founders else 1

    def is_behind(self, other: LogHead) -> bool:
        """Whether ``other``, on another branch, is the one to follow: more tokens, then the lower digest."""
        return (-other.total_tokens, other.log_digest) < (-self.total_tokens, self.log_digest)


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
        founders=tuple(genesis.voters),
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
    if len(record.state_digest) != digest.DIGEST_BYTES or len(record.codec.encode()) > MAX_CODEC_BYTES:
        raise ProtocolError("a record names no state, or no codec")
    if len(record.opened_by.leader) not in (0, PUBLIC_KEY_BYTES):
        raise ProtocolError("the key of whoever opened the round has a wrong length")
    _check_voters(record.next_voters)
    _check_parts(record.parts)
    if record.total_tokens != head.total_tokens + sum(tokens_by_peer(record).values()):
        raise ProtocolError(f"round {record.round}: its tokens do not add up")
    return record


def check_reducers(record: Record, head: LogHead) -> None:
    """Raise `SignatureError` unless every average of ``record`` is signed by the reducer that it names."""
    for part in record.parts:
        if part.digest:
            averages.check_signature(head.run_id, record, part)


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
    if not all(0 <= norm < math.inf for norm in (*(s.norm for s in shares), *(r.norm for r in rejections))):
        raise ProtocolError("a part has a contribution of an impossible norm")
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
    if signed.signer in vote.gone or not head.may_be_gone(vote.gone):
        raise ProtocolError("a vote that declares voters gone who cannot be")
    if record_digest is not None and vote.record_digest != record_digest:
        raise ProtocolError("a vote for another record")
    return vote


def canonical(commit: Commit, head: LogHead) -> Commit:
    """``commit`` reduced to its proof: the record and the votes of one ballot's majority. It must verify."""
    votes, _ = _proof(commit, head)
    return Commit(
        record=commit.record,
        votes=[
            Signed(signer=signer, payload=votes[signer].payload, signature=votes[signer].signature)
            for signer in sorted(votes)
        ],
    )


def gone_of(commit: Commit, head: LogHead) -> tuple[bytes, ...]:
    """The voters that a verified ``commit`` went on without: not empty where it began a branch."""
    return _proof(commit, head)[1]


def verify_commit(head: LogHead, commit: Commit) -> tuple[Record, LogHead]:
    """The record that ``commit`` proves, and the head after it."""
    record = parse_record(commit.record, head)
    if len(commit.votes) > MAX_VOTERS:
        raise ProtocolError("a commit with too many votes")
    record_digest = digest.sha256(commit.record)
    for signed in commit.votes:
        verify_vote(signed, head, record_digest)
    if not _proof(commit, head)[0]:
        raise VerificationError(f"round {record.round}: no majority of its voters signed the commit")
    check_reducers(record, head)  # after the votes: these are few, and a stranger has none
    return record, next_head(head, commit.record, record)


def _proof(commit: Commit, head: LogHead) -> tuple[dict[bytes, Signed], tuple[bytes, ...]]:
    """The votes of one ballot that decide, and whom they go on without; no votes where none do.

    Of several such ballots the one that misses the fewest voters, then that of most votes.
    """
    ballots: dict[tuple[tuple[bytes, ...], int, bytes], dict[bytes, Signed]] = {}
    for signed in commit.votes:
        vote = Vote.FromString(signed.payload)
        key = (tuple(vote.gone), vote.ballot.number, vote.ballot.leader)
        ballots.setdefault(key, {})[signed.signer] = signed
    deciding = {key: votes for key, votes in ballots.items() if head.decides(votes, key[0])}
    best = max(deciding, key=lambda key: (-len(key[0]), len(deciding[key]), key), default=None)
    return ({}, ()) if best is None else (deciding[best], best[0])


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
        if part.digest and not part.signature:
            raise EarlierVersion(
                "written by version 1 of the protocol, whose averages carry no reducer's signature;"
                f" this program speaks version {PROTOCOL_VERSION}"
            )
        if part.digest and (len(part.reducer) != PUBLIC_KEY_BYTES or len(part.signature) != SIGNATURE_BYTES):
            raise ProtocolError("a part of a record names no reducer, or is not signed by it")
        if part.digest and (len(part.digest) != digest.DIGEST_BYTES or not 1 <= len(part.shares) <= MAX_MEMBERS):
            raise ProtocolError("a part of a record names no digest or no contributors")
        if not part.digest and (part.shares or part.rejections or part.handed_over_by or part.reducer):
            raise ProtocolError("an absent part names contributors")
        if len(part.handed_over_by) > MAX_MEMBERS or len(set(part.handed_over_by)) != len(part.handed_over_by):
            raise ProtocolError("a part was handed over too often, or by one peer twice")
        if any(len(key) != PUBLIC_KEY_BYTES for key in part.handed_over_by):
            raise ProtocolError("the key of a peer that handed over has a wrong length")
        check_verdicts(part.shares, part.rejections)
    if not any(part.digest for part in parts):
        raise ProtocolError("a record in which every part is absent")
