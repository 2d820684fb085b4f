"""A shard's arithmetic: error feedback, equal states from equal bytes, hostile averages."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from peer.rounds.blocks import BLOCK_VALUES, Blocks
from peer.rounds.codec import CODECS
from peer.rounds.exchange_parts import Committed, tell_verdicts
from peer.rounds.paxos import NO_BALLOT, Ballot, to_message
from peer.rounds.planning import SLICE_VALUES
from peer.rounds.reducer_debt import MAX_ATTEMPTS, ReducerDebt
from peer.rounds.round_actions import Reduce
from peer.rounds.shard import ReplicaSnapshot, Settling, Shard, StateBuffers, load_state
from swarm import digest
from swarm.errors import DigestError, ProtocolError
from swarm.identity import Identity
from swarm.log import LogHead
from swarm.proto.round_pb2 import Average, OpenRound, Part, PartResult, Record, Share
from swarm.run_spec import Robust, Rounds
from tests.simulation.swarm_in_memory import make_spec

ME, OTHER = b"m" * 32, b"o" * 32
NUM_VALUES = 3 * SLICE_VALUES + 100
SPEC = make_spec(Identity(b"1" * 32), Identity(b"2" * 32))
SPARSE_SPEC = make_spec(
    Identity(b"1" * 32), Identity(b"2" * 32), {"momentum": 0.0}, contribution_codecs=["int8", "topk"]
)
INT2_ROUNDS = Rounds(wire_codec="int2", contribution_codecs=("int8",))


def make_shard(seed: int = 0) -> Shard:
    anchor = np.random.default_rng(seed).standard_normal(NUM_VALUES).astype(np.float32)
    return Shard(SPEC, 0, anchor)


def moved(shard: Shard, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(NUM_VALUES).astype(np.float32) * 1e-2


ALL = slice(0, NUM_VALUES)
# What reducers say of contributions where a test is about something else: averages may be as long.
LONG = 1e6


def within_a_code(kept: np.ndarray, exact: np.ndarray) -> bool:
    """Each value is within one code of its block of what was booked."""
    starts = np.arange(0, len(exact), BLOCK_VALUES)
    codes = np.repeat(np.maximum.reduceat(np.abs(exact), starts) / 127, BLOCK_VALUES)[: len(exact)]
    return bool((np.abs(kept - exact) <= codes * (1 + 1e-4)).all())


OPENED = OpenRound(parts=[Part(first_slice=0, num_slices=2), Part(first_slice=2, num_slices=2)])


def by_part(shard: Shard, snapshot: ReplicaSnapshot) -> dict[int, bytes]:
    snapshot.offer_to(NO_BALLOT)
    return {part.first_slice: shard.encode(snapshot, part) for part in OPENED.parts}


def committed(
    shard: Shard, encoded: dict[int, bytes], shares: dict[int, list[bytes]]
) -> tuple[Record, dict[bytes, bytes]]:
    """A record of one average per part that is present (first slice -> encoded average, and who is in it)."""
    record, parts = Record(round=1), {}
    for part in OPENED.parts:
        result = PartResult(first_slice=part.first_slice, num_slices=part.num_slices)
        if part.first_slice in encoded:
            data = encoded[part.first_slice]
            result.digest = digest.sha256(data)
            result.shares.extend(Share(peer_key=key, weight_tokens=10, norm=LONG) for key in shares[part.first_slice])
            parts[result.digest] = data
        record.parts.append(result)
    return record, parts


def test_what_a_commit_counted_leaves_only_its_encoding_error_behind() -> None:
    shard = make_shard()
    snapshot = shard.offer(moved(shard, 1), 10)
    assert snapshot is not None
    encoded = by_part(shard, snapshot)
    record, parts = committed(shard, encoded, {0: [ME], 2: [ME, OTHER]})
    assert shard.apply(record, parts, Settling(snapshot, ME))
    sent = np.concatenate([shard.codec.decode(encoded[0], 2 * SLICE_VALUES), _tail(shard, encoded[2])])
    owed = shard.owed(ALL)
    assert within_a_code(owed, -snapshot.movement[:] - sent)
    assert np.abs(owed).max() < np.abs(snapshot.movement[:]).max() / 100


def _tail(shard: Shard, encoded: bytes) -> np.ndarray:
    return shard.codec.decode(encoded, NUM_VALUES - 2 * SLICE_VALUES)


@pytest.mark.parametrize(
    ("case", "present", "shares"),
    [
        ("the part is absent", {0}, {0: [ME]}),
        ("others are in the part", {0, 2}, {0: [ME], 2: [OTHER]}),
    ],
)
def test_what_a_commit_did_not_count_stays_owed_in_full(
    case: str, present: set[int], shares: dict[int, list[bytes]]
) -> None:
    shard = make_shard()
    snapshot = shard.offer(moved(shard, 1), 10)
    assert snapshot is not None
    record, parts = committed(shard, {k: v for k, v in by_part(shard, snapshot).items() if k in present}, shares)
    assert shard.apply(record, parts, Settling(snapshot, ME)), case
    tail = slice(2 * SLICE_VALUES, NUM_VALUES)
    assert within_a_code(shard.owed(tail), -snapshot.movement[tail])


def test_a_share_that_another_process_of_ours_earned_counts_for_nothing() -> None:
    """A commit of an attempt that this snapshot was not offered to holds what was sent before we were killed."""
    shard = make_shard()
    snapshot = shard.offer(moved(shard, 1), 10)
    assert snapshot is not None
    encoded = by_part(shard, snapshot)
    record, parts = committed(shard, encoded, {0: [ME], 2: [ME, OTHER]})
    record.opened_by.CopyFrom(to_message((3, OTHER)))
    assert not shard.apply(record, parts, Settling(snapshot, ME))
    assert within_a_code(shard.owed(ALL), -snapshot.movement[:])


def test_what_the_killed_process_owed_went_with_its_share() -> None:
    """It lies on disk when the next process begins: no commit takes it twice, and where no share was taken it stays."""
    shard = make_shard()
    shard.feedback = Blocks(NUM_VALUES)
    shard.feedback.write(ALL, moved(shard, 2), 1)
    before = shard.owed(ALL)
    snapshot = shard.offer(moved(shard, 1), 10)
    assert snapshot is not None
    record, parts = committed(shard, by_part(shard, snapshot), {0: [ME], 2: [OTHER]})
    record.opened_by.CopyFrom(to_message((3, OTHER)))
    assert not shard.apply(record, parts, Settling(snapshot, ME))
    taken, left = slice(0, 2 * SLICE_VALUES), slice(2 * SLICE_VALUES, NUM_VALUES)
    assert within_a_code(shard.owed(taken), -snapshot.movement[taken])
    assert within_a_code(shard.owed(left), before[left] - snapshot.movement[left])


def test_over_many_rounds_offers_and_debts_add_up_to_the_movement() -> None:
    """What was sent so far plus what is owed is all movement, but for the rounding of what is owed."""
    shard = make_shard()
    total = np.zeros(NUM_VALUES, np.float64)
    sent = np.zeros(NUM_VALUES, np.float64)
    for number in range(1, 6):
        movement = moved(shard, number)
        total -= movement.astype(np.float64)
        snapshot = shard.offer(movement, 10)
        assert snapshot is not None
        encoded = by_part(shard, snapshot)
        present = encoded if number % 2 else {0: encoded[0]}
        record, parts = committed(shard, present, {first: [ME] for first in present})
        shard.apply(record, parts, Settling(snapshot, ME))
        sent[: 2 * SLICE_VALUES] += shard.codec.decode(encoded[0], 2 * SLICE_VALUES)
        if 2 in present:
            sent[2 * SLICE_VALUES :] += _tail(shard, encoded[2])
    # Two bookings of a part that was left out, a code of at most 5e-2 / 127 each; the others' codes are far smaller.
    np.testing.assert_allclose(sent + shard.owed(ALL), total, atol=2 * 5e-2 / 127)


def test_replicas_that_apply_the_same_bytes_hold_equal_digests_and_absent_slices_do_not_move() -> None:
    first, second = make_shard(), make_shard()
    snapshot = first.offer(moved(first, 3), 10)
    assert snapshot is not None
    record, parts = committed(first, {0: by_part(first, snapshot)[0]}, {0: [ME]})
    before = first.anchor.copy()
    for shard in (first, second):
        shard.apply(record, parts)
    assert first.state_digest == second.state_digest != make_shard().state_digest
    assert (first.anchor[: 2 * SLICE_VALUES] != before[: 2 * SLICE_VALUES]).any()
    np.testing.assert_array_equal(first.anchor[2 * SLICE_VALUES :], before[2 * SLICE_VALUES :])


def test_an_average_that_does_not_decode_is_absent_for_everybody() -> None:
    shard = make_shard()
    garbage = b"\xff" * shard.part_size_bytes(0, 2)
    snapshot = shard.offer(moved(shard, 1), 10)
    assert snapshot is not None
    record, parts = committed(shard, {0: garbage}, {0: [ME]})
    before = shard.state_digest
    assert not shard.apply(record, parts, Settling(snapshot, ME))
    assert within_a_code(shard.owed(ALL), -snapshot.movement[:])
    assert shard.state_digest == before


def test_a_replica_that_is_not_finite_offers_nothing() -> None:
    shard = make_shard()
    movement = moved(shard, 1)
    movement[5] = np.nan
    assert shard.offer(movement, 10) is None


def test_the_average_is_by_tokens_and_leaves_out_what_does_not_decode() -> None:
    shard = make_shard()
    count = 2 * SLICE_VALUES
    ones, fours = np.ones(count, np.float32), np.full(count, 4, np.float32)
    contributions = (
        (Share(peer_key=ME, weight_tokens=20), "int8", CODECS["int8"].encode(ones)),
        (Share(peer_key=OTHER, weight_tokens=10), "int4", CODECS["int4"].encode(fours)),
        (Share(peer_key=b"h" * 32, weight_tokens=10), "int8", b"\xff" * shard.part_size_bytes(0, 2)),
    )
    average, encoded = plain_shard().reduce(Reduce((1, ME), 0, 0, 2, contributions))
    assert [share.peer_key for share in average.shares] == [ME, OTHER]
    np.testing.assert_allclose(shard.codec.decode(encoded, count), 2.0, rtol=1e-2)


def plain_shard() -> Shard:
    spec = SPEC.model_copy(update={"robust": Robust(rule="none")})
    return Shard(spec, 0, np.zeros(NUM_VALUES, np.float32))


def judged_average(shard: Shard) -> tuple[list[bytes], Average]:
    """Five contributions to the first part: the first is long, the last points the other way."""
    common, random = moved(shard, 0)[: 2 * SLICE_VALUES], np.random.default_rng(5)
    keys = [bytes([65 + index]) * 32 for index in range(5)]
    factors = [8.0, 1.0, 1.0, 1.0, -1.0]
    noise = [random.standard_normal(len(common)).astype(np.float32) * 1e-3 for _ in keys]
    encoded = [shard.codec.encode(np.float32(f) * (common + n)) for f, n in zip(factors, noise, strict=True)]
    contributions = tuple(
        (Share(peer_key=key, weight_tokens=10), "int8", data) for key, data in zip(keys, encoded, strict=True)
    )
    average, mean = shard.reduce(Reduce((1, ME), 0, 0, 2, contributions))
    np.testing.assert_allclose(shard.codec.decode(mean, len(common)), common, atol=3e-3)
    return keys, average


def test_the_average_tells_who_was_clipped_and_who_was_rejected_and_why() -> None:
    keys, average = judged_average(make_shard())
    assert [share.peer_key for share in average.shares] == keys[:4]
    assert average.shares[0].clipped_to == pytest.approx(1 / 8, rel=0.05)
    assert [rejection.peer_key for rejection in average.rejections] == keys[4:]
    assert average.rejections[0].cosine < -0.9 and 0.4 < average.rejections[0].min_cosine < 0.5


@pytest.mark.parametrize("case", ["clipped", "rejected"])
def test_what_was_clipped_off_or_rejected_is_discarded_and_not_owed_again(case: str) -> None:
    shard = make_shard()
    snapshot = shard.offer(moved(shard, 1), 10)
    assert snapshot is not None
    encoded = by_part(shard, snapshot)
    record, parts = committed(shard, {0: encoded[0]}, {0: [OTHER]})
    if case == "clipped":
        record.parts[0].shares.add(peer_key=ME, weight_tokens=10, clipped_to=0.1)
    else:
        record.parts[0].rejections.add(peer_key=ME, cosine=-0.5, min_cosine=0.1)
    assert shard.apply(record, parts, Settling(snapshot, ME)), "the tokens leave with the movement"
    first = slice(0, 2 * SLICE_VALUES)
    sent = shard.codec.decode(encoded[0], 2 * SLICE_VALUES)
    error = -snapshot.movement[first] - sent
    np.testing.assert_allclose(shard.owed(first), error, atol=np.abs(error).max() / 64)  # debt lies in 8 bits


def test_a_contributor_is_told_what_was_rejected_or_clipped_and_the_others_are_told_nothing() -> None:
    record = Record(parts=[PartResult(num_slices=2), PartResult(first_slice=2, num_slices=2)])
    record.parts[0].rejections.add(peer_key=ME, cosine=-0.5, min_cosine=0.125)
    record.parts[1].shares.add(peer_key=ME, weight_tokens=10, clipped_to=0.25)
    record.parts[1].shares.add(peer_key=OTHER, weight_tokens=10)
    head = LogHead(run_id=b"r" * 20, shard=0, round=1, log_digest=b"", voters=(), total_tokens=10)
    committed = Committed(
        record=record, head=head, state_digest=b"", counted=True, refused=("another state", "too heavy")
    )
    told = tell_verdicts(committed, ME)
    assert told["refused"] == "another state; too heavy"
    assert "1 of 2 parts" in told["rejected"] and "-0.50" in told["rejected"] and "0.12" in told["rejected"]
    assert "1 of 1 parts" in told["clipped"] and "25%" in told["clipped"]
    assert tell_verdicts(dataclasses.replace(committed, refused=()), OTHER) == {}


def test_what_is_owed_over_a_hundred_absent_rounds_is_right_on_average() -> None:
    """Small movement beside large in one block: rounding to the nearest would leave nothing of it."""
    shard, absent = make_shard(), Record(parts=[PartResult(first_slice=0, num_slices=4)])
    movement = np.zeros(NUM_VALUES, np.float32)
    movement[::2], movement[1::2] = 1e-3, 1.0
    for number in range(1, 101):
        snapshot = shard.offer(movement, 10)
        assert snapshot is not None
        absent.round = number
        assert not shard.apply(absent, {}, Settling(snapshot, ME))
    owed = shard.owed(ALL)
    assert abs(-owed[::2].mean() - 100 * 1e-3) < 5e-3 and abs(-owed[1::2].mean() / 100 - 1) < 1e-4


def test_a_peer_that_contributes_nothing_keeps_no_debt() -> None:
    first, seed = make_shard(), make_shard()
    snapshot = first.offer(moved(first, 3), 10)
    assert snapshot is not None
    record, parts = committed(first, {0: by_part(first, snapshot)[0]}, {0: [ME]})
    seed.apply(record, parts)
    assert seed.feedback is None and not seed.owed(ALL).any()


def buffers_of(shard: Shard) -> StateBuffers:
    buffers = StateBuffers(shard.num_values)
    for room, data in zip(buffers.views, shard.state_bytes(), strict=True):
        room[:] = data
    return buffers


def test_a_state_is_loaded_only_under_its_own_digest() -> None:
    shard = make_shard()
    shard.momentum.write(ALL, moved(shard, 2), 1)
    shard.state_digest = digest.state_digest(*shard.chunk_digests())
    loaded = load_state(SPEC, 0, buffers_of(shard), shard.state_digest)
    assert (
        loaded.state_digest == shard.state_digest and digest.state_digest(*loaded.chunk_digests()) == shard.state_digest
    )
    for which in (0, 1):
        flipped = buffers_of(shard)
        flipped.views[which][-1] ^= 1
        with pytest.raises(DigestError, match="digest"):
            load_state(SPEC, 0, flipped, shard.state_digest)


def test_a_state_with_momentum_that_no_encoder_writes_is_refused_although_its_digest_is_right() -> None:
    shard = make_shard()
    shard.momentum.codes[5] = -128
    with pytest.raises(ProtocolError, match="no encoder writes"):
        load_state(SPEC, 0, buffers_of(shard), digest.state_digest(*shard.chunk_digests()))


def test_what_a_thin_rung_leaves_out_stays_owed() -> None:
    """The debt is what the codec that was sent lost, not what the codec of averages would have."""
    shard = Shard(SPARSE_SPEC, 0, np.zeros(NUM_VALUES, np.float32))
    snapshot = shard.offer(moved(shard, 1), 10, "topk")
    assert snapshot is not None
    sent = {first: data for first, data in by_part(shard, snapshot).items() if first == 2}
    average = CODECS["int8"].encode(CODECS["topk"].decode(sent[2], NUM_VALUES - 2 * SLICE_VALUES))
    record, parts = committed(shard, {2: average}, {2: [ME]})
    assert shard.apply(record, parts, Settling(snapshot, ME))
    tail = slice(2 * SLICE_VALUES, NUM_VALUES)
    left = -snapshot.movement[tail] - CODECS["topk"].decode(sent[2], NUM_VALUES - 2 * SLICE_VALUES)
    assert within_a_code(shard.owed(tail), left)
    assert np.linalg.norm(left) > 0.8 * np.linalg.norm(snapshot.movement[tail])
    assert shard.offer(moved(shard, 1), 10).codec == "int8", "the densest where nothing is said"  # type: ignore[union-attr]


def ones(codec: str = "int4") -> bytes:
    return CODECS[codec].encode(np.ones(2 * SLICE_VALUES, np.float32))


@pytest.mark.parametrize(
    ("case", "codec", "encoded", "told"),
    [
        ("a rung of other runs", "topk", ones("topk"), "takes int8, int4, int2"),
        ("no codec", "", ones(), "in the codec ''"),
        ("a name without end", "x" * 10**6, ones(), "in the codec 'xxxxxxxxxxxxxxxx';"),
        ("the size of another rung", "int8", ones(), "bytes instead of"),
        ("bytes that no encoder writes", "int4", b"\xff" * len(ones()), "no encoder writes"),
    ],
)
def test_a_contribution_on_no_rung_is_refused_by_name(case: str, codec: str, encoded: bytes, told: str) -> None:
    """A reducer decodes what the run spec's ladder names, and nothing else."""
    shard = make_shard()
    shard.check_contribution(0, 2, "int4", ones())
    with pytest.raises(ProtocolError, match=re.escape(told)):
        shard.check_contribution(0, 2, codec, encoded)


def reduced(shard: Shard, ballot: Ballot, values: np.ndarray) -> tuple[Record, dict[bytes, bytes]]:
    """The record of a round in which ``shard`` averaged part 0 under ``ballot``; the other part is absent."""
    contributions = tuple(
        (Share(peer_key=key, weight_tokens=10), "int8", CODECS["int8"].encode(values * np.float32(factor)))
        for key, factor in ((ME, 0.5), (OTHER, 1.5))
    )
    _, average = shard.reduce(Reduce(ballot, 0, 0, 2, contributions))
    record, parts = committed(shard, {0: average}, {0: [ME, OTHER]})
    record.opened_by.CopyFrom(to_message(ballot))
    return record, parts


def test_what_averages_lose_is_added_to_the_next_average_of_the_same_slices() -> None:
    """Over many rounds averages in 2 bits add up to the movement: the reducer owes what each of them lost."""
    rules = {"rounds": INT2_ROUNDS, "robust": Robust(rule="none")}
    shard = Shard(SPARSE_SPEC.model_copy(update=rules), 0, np.zeros(NUM_VALUES, np.float32))
    values = np.random.default_rng(3).standard_normal(2 * SLICE_VALUES).astype(np.float32)
    total = np.zeros(2 * SLICE_VALUES, np.float64)
    errors = []
    for number in range(1, 13):
        record, parts = reduced(shard, (1, ME), values)
        shard.apply(record, parts)
        total += shard.codec.decode(next(iter(parts.values())), 2 * SLICE_VALUES)
        errors.append(float(np.linalg.norm(total / number - values) / np.linalg.norm(values)))
    assert errors[0] > 0.3 and errors[-1] < 0.1, errors


def test_only_the_average_that_was_committed_leaves_a_debt() -> None:
    """An attempt that was abandoned, or lost to another one, changes nothing, however many there were."""
    shard, once = make_shard(), make_shard()
    values = np.random.default_rng(3).standard_normal(2 * SLICE_VALUES).astype(np.float32)
    for ballot in ((1, ME), (2, OTHER), (3, ME)):
        record, parts = reduced(shard, ballot, values)
    assert shard.reducer_debt.size_bytes == 0, "nothing is committed yet"
    shard.apply(record, parts)
    once_record, once_parts = reduced(once, (3, ME), values)
    once.apply(once_record, once_parts)
    owed, owed_by_once = np.zeros((2, 2 * SLICE_VALUES), np.float32)
    shard.reducer_debt.add_to(owed, 0)
    once.reducer_debt.add_to(owed_by_once, 0)
    np.testing.assert_array_equal(owed, owed_by_once)
    assert owed.any()


@pytest.mark.parametrize("case", ["another attempt's", "other bytes", "absent"])
def test_an_average_of_ours_that_is_not_in_the_commit_leaves_no_debt(case: str) -> None:
    """Somebody else's average in its place owes its losses to its own reducer."""
    shard = make_shard()
    values = np.random.default_rng(3).standard_normal(2 * SLICE_VALUES).astype(np.float32)
    record, parts = reduced(shard, (1, ME), values)
    if case == "another attempt's":
        record.opened_by.number = 2
    elif case == "other bytes":
        other = CODECS["int8"].encode(values * 2)
        record.parts[0].digest = digest.sha256(other)
        parts = {digest.sha256(other): other}
    else:
        record.parts[0].digest = b""
    shard.apply(record, parts)
    assert shard.reducer_debt.size_bytes == 0
    again, _ = reduced(shard, (1, ME), values)
    assert again.parts[0].digest == reduced(make_shard(), (1, ME), values)[0].parts[0].digest


def test_the_losses_of_many_attempts_are_forgotten_but_for_the_newest() -> None:
    """A leader that opens attempts for ever does not fill a reducer's memory."""
    debt = ReducerDebt()
    for number in range(1, 50):
        debt.note((number, b"l" * 32), 0, b"d" * 32, np.ones(100, np.float32))
    assert len(debt._lost) == MAX_ATTEMPTS
