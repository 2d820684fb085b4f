"""The log: which commits prove themselves, as a table of honest and hostile ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from swarm import digest, log
from swarm.errors import EarlierVersion, ProtocolError, SignatureError, SwarmError, VerificationError
from swarm.identity import Identity
from swarm.proto.common_pb2 import Genesis, ShardGenesis, Signed
from swarm.proto.round_pb2 import Ballot, Commit, PartResult, Record, Rejection, Share, Vote
from tests.signed_averages import sign_averages

RUN_ID = b"r" * 20
ORGANIZER = Identity(b"\x10" * 32)
VOTERS = [Identity(bytes([index]) * 32) for index in range(1, 6)]
STRANGER = Identity(b"\x20" * 32)
GENESIS = Genesis(
    run_id=RUN_ID,
    voters=[voter.public_key for voter in VOTERS],
    shards=[ShardGenesis(state_digest=b"s" * 32, num_values=8)],
)

HEAD = log.genesis_head(GENESIS, 0)
PEER_A, PEER_B = b"a" * 32, b"b" * 32


def _record(head: log.LogHead = HEAD) -> Record:
    parts = [
        PartResult(
            first_slice=0,
            num_slices=2,
            digest=b"d" * 32,
            shares=[Share(peer_key=PEER_A, weight_tokens=30), Share(peer_key=PEER_B, weight_tokens=20)],
        ),
        PartResult(first_slice=2, num_slices=1, digest=b"e" * 32, shares=[Share(peer_key=PEER_A, weight_tokens=30)]),
        PartResult(first_slice=3, num_slices=1),
    ]
    record = Record(
        shard=0,
        round=head.round + 1,
        log_digest=head.log_digest,
        state_digest=b"s" * 32,
        parts=parts,
        next_voters=[voter.public_key for voter in VOTERS[:3]],
        total_tokens=head.total_tokens + 50,
        codec="int8",
    )
    return sign_averages(record, RUN_ID)


def _vote(
    voter: Identity,
    raw: bytes,
    *,
    number: int = 1,
    leader: bytes = PEER_A,
    round_number: int = 1,
    run_id: bytes = RUN_ID,
    gone: Sequence[bytes] = (),
) -> Signed:
    ballot = Ballot(number=number, leader=leader)
    vote = Vote(shard=0, round=round_number, ballot=ballot, record_digest=digest.sha256(raw), gone=gone)
    return voter.sign(log.VOTE_CONTEXT, run_id, vote.SerializeToString())


def _commit(record: Record, voters: Sequence[Identity] = VOTERS[:3]) -> Commit:
    raw = record.SerializeToString(deterministic=True)
    return Commit(record=raw, votes=[_vote(voter, raw) for voter in voters])


def _changed(change: Callable[[Record], object]) -> Commit:
    """A commit that all voters signed, of a record that should not pass all the same."""
    record = _record()
    change(record)
    return _commit(record, VOTERS)


def _with_votes(votes: Callable[[bytes], list[Signed]]) -> Commit:
    raw = _record().SerializeToString(deterministic=True)
    return Commit(record=raw, votes=votes(raw))


def _signed_payload(voter: Identity, payload: bytes, context: str = log.VOTE_CONTEXT) -> Signed:
    return voter.sign(context, RUN_ID, payload)


def test_a_majority_proves_a_commit() -> None:
    """Three of five voters of one ballot are enough; the next head follows from the record alone."""
    commit = _commit(_record())
    record, head = log.verify_commit(HEAD, commit)
    assert record == _record()
    assert (head.round, head.total_tokens) == (1, 50)
    assert head.log_digest == digest.extend_log(HEAD.log_digest, commit.record)
    assert head.voters == tuple(voter.public_key for voter in VOTERS[:3])


def test_a_chain_of_commits_is_decided_by_the_voters_that_each_names() -> None:
    """Round 2 is proven by the voters of record 1; a voter that it dropped has no say."""
    _, head = log.verify_commit(HEAD, _commit(_record()))
    second = _record(head)
    raw = second.SerializeToString(deterministic=True)
    commit = Commit(record=raw, votes=[_vote(voter, raw, round_number=2) for voter in VOTERS[1:3]])
    assert log.verify_commit(head, commit)[1].total_tokens == 100
    dropped = Commit(record=raw, votes=[_vote(voter, raw, round_number=2) for voter in VOTERS[3:5]])
    with pytest.raises(SignatureError):
        log.verify_commit(head, dropped)


def test_votes_of_an_older_ballot_do_no_harm_to_a_majority() -> None:
    """Three votes of ballot 2 prove the commit beside two of ballot 1."""
    commit = _with_votes(
        lambda raw: [
            *(_vote(voter, raw) for voter in VOTERS[:2]),
            *(_vote(voter, raw, number=2) for voter in VOTERS[2:]),
        ]
    )
    assert log.verify_commit(HEAD, commit)[1].round == 1


VOTE_CASES: list[tuple[str, Callable[[bytes], list[Signed]], type[SwarmError], str]] = [
    ("no votes", lambda raw: [], VerificationError, "no majority"),
    ("a minority", lambda raw: [_vote(v, raw) for v in VOTERS[:2]], VerificationError, "no majority"),
    ("one voter thrice", lambda raw: [_vote(VOTERS[0], raw)] * 3, VerificationError, "no majority"),
    (
        "one voter in three ballots",
        lambda raw: [_vote(VOTERS[0], raw, number=number) for number in (1, 2, 3)],
        VerificationError,
        "no majority",
    ),
    (
        "a majority over two ballots",
        lambda raw: [_vote(VOTERS[0], raw), _vote(VOTERS[1], raw), _vote(VOTERS[2], raw, number=2)],
        VerificationError,
        "no majority",
    ),
    (
        "one number, two leaders",
        lambda raw: [_vote(VOTERS[0], raw), _vote(VOTERS[1], raw), _vote(VOTERS[2], raw, leader=PEER_B)],
        VerificationError,
        "no majority",
    ),
    (
        "a foreign voter",
        lambda raw: [_vote(v, raw) for v in (*VOTERS[:2], STRANGER)],
        SignatureError,
        "no voter of this round",
    ),
    (
        "votes for another record",
        lambda raw: [_vote(v, raw + b"x") for v in VOTERS],
        ProtocolError,
        "another record",
    ),
    (
        "votes of another round",
        lambda raw: [_vote(v, raw, round_number=2) for v in VOTERS],
        ProtocolError,
        "round 2 instead of 1",
    ),
    (
        "votes of another run",
        lambda raw: [_vote(v, raw, run_id=b"x" * 20) for v in VOTERS],
        SignatureError,
        "does not verify",
    ),
    ("too many votes", lambda raw: [_vote(VOTERS[0], raw)] * 8, ProtocolError, "too many"),
    (
        "votes that are no votes",
        lambda raw: [_signed_payload(v, b"\xff") for v in VOTERS],
        ProtocolError,
        "cannot be read",
    ),
    (
        "signatures of another kind",
        lambda raw: [_signed_payload(v, raw, "status") for v in VOTERS],
        SignatureError,
        "does not verify",
    ),
]


@pytest.mark.parametrize(("name", "votes", "error", "match"), VOTE_CASES, ids=[case[0] for case in VOTE_CASES])
def test_a_commit_without_a_majority_of_one_ballot_is_refused(
    name: str, votes: Callable[[bytes], list[Signed]], error: type[SwarmError], match: str
) -> None:
    """Whatever is missing from the votes has its own name."""
    with pytest.raises(error, match=match):
        log.verify_commit(HEAD, _with_votes(votes))


RECORD_CASES: list[tuple[str, Callable[[Record], object], type[SwarmError], str]] = [
    ("another shard", lambda r: setattr(r, "shard", 1), ProtocolError, "cannot follow"),
    ("the round before", lambda r: setattr(r, "round", 0), ProtocolError, "cannot follow"),
    ("a round skipped", lambda r: setattr(r, "round", 2), ProtocolError, "cannot follow"),
    ("another parent", lambda r: setattr(r, "log_digest", b"x" * 32), VerificationError, "another log"),
    ("no parent", lambda r: setattr(r, "log_digest", b""), VerificationError, "another log"),
    ("tokens too many", lambda r: setattr(r, "total_tokens", 51), ProtocolError, "do not add up"),
    ("tokens too few", lambda r: setattr(r, "total_tokens", 0), ProtocolError, "do not add up"),
    ("no next voters", lambda r: r.ClearField("next_voters"), ProtocolError, "0 voters"),
    ("a voter twice", lambda r: r.next_voters.append(r.next_voters[0]), ProtocolError, "different"),
    (
        "eight voters",
        lambda r: r.next_voters.extend(bytes([i]) * 32 for i in range(100, 105)),
        ProtocolError,
        "8 voters",
    ),
    ("a voter cut short", lambda r: r.next_voters.append(b"short"), ProtocolError, "wrong length"),
    ("no parts", lambda r: r.ClearField("parts"), ProtocolError, "0 parts"),
    (
        "too many parts",
        lambda r: r.parts.extend(PartResult(first_slice=4 + i, num_slices=1) for i in range(62)),
        ProtocolError,
        "65 parts",
    ),
    ("a gap", lambda r: setattr(r.parts[1], "first_slice", 3), ProtocolError, "cover the shard once"),
    ("an overlap", lambda r: setattr(r.parts[1], "first_slice", 1), ProtocolError, "cover the shard once"),
    ("an empty part", lambda r: setattr(r.parts[2], "num_slices", 0), ProtocolError, "cover the shard once"),
    ("a digest that no reducer signed", lambda r: setattr(r.parts[0], "digest", b"x" * 32), SignatureError, "verify"),
    ("a part at another place", lambda r: setattr(r.parts[0], "size_bytes", 1), SignatureError, "verify"),
    ("another weight", lambda r: setattr(r.parts[0].shares[0], "weight_tokens", 29), SignatureError, "verify"),
    ("another norm", lambda r: setattr(r.parts[0].shares[1], "norm", 19.0), SignatureError, "verify"),
    ("another share clipped", lambda r: setattr(r.parts[0].shares[1], "clipped_to", 0.5), SignatureError, "verify"),
    ("a contributor's losses", lambda r: r.parts[0].handed_over_by.append(PEER_A), SignatureError, "verify"),
    ("another reducer", lambda r: setattr(r.parts[0], "reducer", PEER_A), SignatureError, "verify"),
    ("of another attempt", lambda r: setattr(r.opened_by, "number", 7), SignatureError, "verify"),
    ("of another state", lambda r: setattr(r, "state_digest", b"x" * 32), SignatureError, "verify"),
    ("a state cut short", lambda r: setattr(r, "state_digest", b"s"), ProtocolError, "no state"),
    ("a state without end", lambda r: setattr(r, "state_digest", b"s" * 70_000), ProtocolError, "no state"),
    ("a codec without end", lambda r: setattr(r, "codec", "x" * 70_000), ProtocolError, "no codec"),
    (
        "opened by an endless key",
        lambda r: setattr(r.opened_by, "leader", b"x" * 70_000),
        ProtocolError,
        "wrong length",
    ),
    (
        "losses of an endless key",
        lambda r: r.parts[0].handed_over_by.append(b"x" * 70_000),
        ProtocolError,
        "wrong length",
    ),
    ("no reducer", lambda r: r.parts[0].ClearField("reducer"), ProtocolError, "no reducer"),
    ("no signature", lambda r: r.parts[0].ClearField("signature"), EarlierVersion, "version 1 of the protocol"),
    ("an absent part with a reducer", lambda r: setattr(r.parts[2], "reducer", PEER_A), ProtocolError, "absent part"),
    ("losses of one twice", lambda r: r.parts[0].handed_over_by.extend([PEER_A] * 2), ProtocolError, "one peer twice"),
    ("a norm below 0", lambda r: setattr(r.parts[0].shares[0], "norm", -1.0), ProtocolError, "impossible norm"),
    ("a norm of NaN", lambda r: setattr(r.parts[0].shares[0], "norm", math.nan), ProtocolError, "impossible norm"),
    ("a digest cut short", lambda r: setattr(r.parts[0], "digest", b"d"), ProtocolError, "no digest"),
    ("nobody contributed", lambda r: r.parts[1].ClearField("shares"), ProtocolError, "no contributors"),
    ("absent with shares", lambda r: r.parts[1].ClearField("digest"), ProtocolError, "absent part"),
    (
        "a contributor twice",
        lambda r: r.parts[0].shares.append(Share(peer_key=PEER_A, weight_tokens=1)),
        ProtocolError,
        "twice",
    ),
    (
        "a contributor without a key",
        lambda r: r.parts[0].shares.append(Share(peer_key=b"", weight_tokens=0)),
        ProtocolError,
        "contributor's key",
    ),
    (
        "a contributor that is averaged and rejected",
        lambda r: r.parts[0].rejections.append(Rejection(peer_key=PEER_A, cosine=-0.5, min_cosine=0.1)),
        ProtocolError,
        "twice",
    ),
    (
        "rejected without a key",
        lambda r: r.parts[0].rejections.append(Rejection(cosine=-0.5, min_cosine=0.1)),
        ProtocolError,
        "contributor's key",
    ),
    (
        "rejected though it agrees",
        lambda r: r.parts[0].rejections.append(Rejection(peer_key=b"r" * 32, cosine=0.5, min_cosine=0.1)),
        ProtocolError,
        "impossible cosine",
    ),
    (
        "rejected for no number",
        lambda r: r.parts[0].rejections.append(Rejection(peer_key=b"r" * 32, cosine=math.nan, min_cosine=0.1)),
        ProtocolError,
        "impossible cosine",
    ),
    (
        "absent with rejections",
        lambda r: r.parts[2].rejections.append(Rejection(peer_key=b"r" * 32, cosine=-0.5, min_cosine=0.1)),
        ProtocolError,
        "absent part",
    ),
    ("clipped to more", lambda r: setattr(r.parts[0].shares[0], "clipped_to", 1.5), ProtocolError, "impossible share"),
    ("clipped to NaN", lambda r: setattr(r.parts[0].shares[0], "clipped_to", math.nan), ProtocolError, "impossible"),
    (
        "too many rejected",
        lambda r: r.parts[0].rejections.extend(
            Rejection(peer_key=bytes([i]) * 32, cosine=-0.5, min_cosine=0.1) for i in range(100, 163)
        ),
        ProtocolError,
        "too many contributors",
    ),
    (
        "too many contributors",
        lambda r: r.parts[0].shares.extend(Share(peer_key=bytes([i]) * 32) for i in range(100, 163)),
        ProtocolError,
        "no contributors",
    ),
]


@pytest.mark.parametrize(("name", "change", "error", "match"), RECORD_CASES, ids=[case[0] for case in RECORD_CASES])
def test_a_malformed_record_is_refused_whoever_signed_it(
    name: str, change: Callable[[Record], object], error: type[SwarmError], match: str
) -> None:
    """All five voters signed, and still the record has to hold together."""
    with pytest.raises(error, match=match):
        log.verify_commit(HEAD, _changed(change))


def test_the_votes_are_looked_at_before_the_signatures_of_reducers(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are up to 64 of these, and whoever sends a record without votes is to cost no more than a look."""
    checked: list[Record] = []
    monkeypatch.setattr(log, "check_reducers", lambda record, head: checked.append(record))
    with pytest.raises(VerificationError, match="no majority"):
        log.verify_commit(HEAD, _commit(_record(), VOTERS[:2]))
    assert not checked
    log.verify_commit(HEAD, _commit(_record()))
    assert checked


@pytest.mark.parametrize(
    ("name", "raw", "match"),
    [("not a record", b"\xff", "cannot be read"), ("huge", bytes(log.MAX_RECORD_BYTES + 1), "too large")],
)
def test_bytes_that_are_no_record_are_refused(name: str, raw: bytes, match: str) -> None:
    """Size first, then form."""
    with pytest.raises(ProtocolError, match=match):
        log.verify_commit(HEAD, Commit(record=raw, votes=[_vote(voter, raw) for voter in VOTERS]))


def test_every_dress_of_a_proof_is_reduced_to_the_same_bytes() -> None:
    """Votes in another order or twice, votes of a lost ballot, holders and unknown fields are no part of the proof."""
    plain = _commit(_record())
    reordered = Commit(record=plain.record, votes=list(plain.votes)[::-1])
    repeated = Commit(record=plain.record, votes=[*plain.votes, plain.votes[0]])
    lost = [_vote(voter, plain.record, number=7, leader=PEER_B) for voter in VOTERS[3:5]]
    mixed = Commit(record=plain.record, votes=[lost[0], *plain.votes, lost[1]])
    dressed = Commit(record=plain.record, votes=plain.votes, holders=[b"h" * 32] * 64)
    dressed.MergeFromString(b"\xba\x06\x04junk")
    dressed.votes[0].MergeFromString(b"\xba\x06\x04junk")
    kept = log.canonical(plain, HEAD)
    assert log.verify_commit(HEAD, kept)[1] == log.verify_commit(HEAD, plain)[1]
    for commit in (reordered, repeated, mixed, dressed, kept):
        assert log.canonical(commit, HEAD).SerializeToString() == kept.SerializeToString()


def test_one_flipped_byte_in_a_signed_record_is_noticed() -> None:
    """No byte of a record can change under the votes."""
    good = _commit(_record(), VOTERS)
    for position in range(len(good.record)):
        raw = bytearray(good.record)
        raw[position] ^= 1
        with pytest.raises(VerificationError):
            log.verify_commit(HEAD, Commit(record=bytes(raw), votes=good.votes))


def test_a_contributor_is_credited_once() -> None:
    """Its largest weight in any present part counts; parts do not add up."""
    assert log.tokens_by_peer(_record()) == {PEER_A: 30, PEER_B: 20}
