"""What averages lose by their encoding: owed by one reducer at a time, handed over, never made good twice."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.rounds.codec import CODECS, Float32
from peer.rounds.paxos import Ballot, to_message
from peer.rounds.planning import SLICE_VALUES
from peer.rounds.reducer_debt import KEPT, MAX_ATTEMPTS, MAX_REDUCERS, ReducerDebt, check_handed_over
from peer.rounds.round_actions import HandOver, Reduce
from peer.rounds.shard import Shard
from swarm import digest
from swarm.errors import ProtocolError
from swarm.identity import Identity
from swarm.proto.round_pb2 import HandedOver, Part, PartResult, Record, Share
from swarm.run_spec import Robust, Rounds
from tests.simulation.swarm_in_memory import make_spec

SLICES = 3
NUM_VALUES = (SLICES - 1) * SLICE_VALUES + 300
KEYS = [bytes([65 + i]) * 32 for i in range(3)]
LEADER = b"l" * 32
SPEC = make_spec(Identity(b"1" * 32), Identity(b"2" * 32)).model_copy(
    update={"rounds": Rounds(wire_codec="int2", contribution_codecs=("int8",)), "robust": Robust(rule="none")}
)
SPLITS = [[(0, 3)], [(0, 1), (1, 2)], [(0, 2), (2, 1)], [(0, 1), (1, 1), (2, 1)]]
BALLOTS = st.integers(1, 3)


@dataclass
class Reducers:
    """Replicas that average each other's slices; what went into averages, and what came out, is added up."""

    rng: random.Random
    shards: dict[bytes, Shard] = field(default_factory=dict)
    round: int = 0
    brought: Float32 = field(default_factory=lambda: np.zeros(NUM_VALUES, np.float32))
    came_out: Float32 = field(default_factory=lambda: np.zeros(NUM_VALUES, np.float32))
    handed_over: int = 0

    def __post_init__(self) -> None:
        for key in KEYS:
            self.shards[key] = Shard(SPEC, 0, np.zeros(NUM_VALUES, np.float32))
            self.shards[key].reducer_debt.me = key

    def live_a_round(self, attempts: int, reach: float) -> Record:
        """Attempts of which the last is committed; what is handed over arrives with the probability ``reach``."""
        self.round += 1
        values = np.random.default_rng(self.rng.randrange(1 << 30)).standard_normal(NUM_VALUES).astype(np.float32)
        for number in range(1, attempts + 1):
            record, parts, means = self._attempt((number, LEADER), values, reach)
        for shard in self.shards.values():
            shard.apply(record, parts)
        for part in record.parts:
            if part.digest:
                place = slice(part.first_slice * SLICE_VALUES, (part.first_slice + part.num_slices) * SLICE_VALUES)
                mean = means[part.digest]
                self.brought[place] += mean
                self.came_out[place] += CODECS["int2"].decode(parts[part.digest], len(mean))
                self.handed_over += len(part.handed_over_by)
        return record

    def _attempt(
        self, ballot: Ballot, values: Float32, reach: float
    ) -> tuple[Record, dict[bytes, bytes], dict[bytes, Float32]]:
        record = Record(round=self.round, opened_by=to_message(ballot))
        parts, means = {}, {}
        for index, (first, count) in enumerate(self.rng.choice(SPLITS)):
            part, reducer = Part(first_slice=first, num_slices=count), self.rng.choice(KEYS)
            encoded = CODECS["int8"].encode(values[first * SLICE_VALUES : (first + count) * SLICE_VALUES])
            offered = [
                (key, self.shards[key].reducer_debt.to_hand_over(first, count)) for key in KEYS if key != reducer
            ]
            arrived = [(key, owed) for key, owed in offered if owed is not None and self.rng.random() < reach]
            share = Share(peer_key=KEYS[0], weight_tokens=10)
            work = Reduce(ballot, index, first, count, ((share, "int8", encoded),), tuple(arrived))
            average, data = self.shards[reducer].reduce(work)
            result = PartResult(first_slice=first, num_slices=part.num_slices)
            if self.rng.random() < 0.8:
                result.digest, result.reducer = digest.sha256(data), reducer
                result.handed_over_by.extend(average.handed_over_by)
                parts[result.digest] = data
                means[result.digest] = CODECS["int8"].decode(
                    encoded, len(values[first * SLICE_VALUES :][: count * SLICE_VALUES])
                )
            record.parts.append(result)
        return record, parts, means

    def owed(self) -> Float32:
        """By all of them together."""
        total = np.zeros(NUM_VALUES, np.float32)
        for shard in self.shards.values():
            shard.reducer_debt.add_to(total, 0)
        return total


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), attempts=st.lists(BALLOTS, min_size=2, max_size=10), reach=st.sampled_from([0.5, 1.0])
)
def test_averages_and_what_is_owed_add_up_to_what_was_averaged(seed: int, attempts: list[int], reach: float) -> None:
    """Whoever averages a slice, in whichever attempt, and whether or not what is owed to it arrives."""
    reducers = Reducers(random.Random(seed))
    for count in attempts:
        reducers.live_a_round(count, reach)
    missing = reducers.brought - reducers.came_out - reducers.owed()
    # Debt is kept in int8: each booking is within half a code, of losses below the largest value, of about 5.
    assert float(np.abs(missing).max()) < 0.05 * len(attempts)
    assert float(np.linalg.norm(missing)) < 0.02 * float(np.linalg.norm(reducers.brought)) + 1e-3


def test_what_is_owed_moves_to_whoever_averages_the_slice_next() -> None:
    """After a round in which everything arrives each slice is owed by its newest reducer alone."""
    reducers = Reducers(random.Random(5))
    for _ in range(12):
        record = reducers.live_a_round(2, 1.0)
        for part in record.parts:
            for key, shard in reducers.shards.items():
                owes = shard.reducer_debt.to_hand_over(part.first_slice, part.num_slices) is not None
                assert owes == (key == part.reducer) or not part.digest
    assert reducers.handed_over > 5


def one_reducer_then(other: bytes) -> tuple[ReducerDebt, ReducerDebt, HandOver]:
    """(who owes, who averages next and saw that commit, what is handed over) of slice 0."""
    owes, takes = ReducerDebt(), ReducerDebt()
    owes.me, takes.me = KEYS[0], KEYS[1]
    lost = np.random.default_rng(1).standard_normal(SLICE_VALUES).astype(np.float32)
    record = Record(opened_by=to_message((1, LEADER)))
    record.parts.add(num_slices=1, digest=b"d" * 32, reducer=other)
    owes.note((1, LEADER), 0, b"d" * 32, lost)
    for debt in (owes, takes):
        debt.settle(record)
    handed_over = owes.to_hand_over(0, 1)
    assert handed_over is not None
    return owes, takes, handed_over


@pytest.mark.parametrize(
    ("case", "reducer", "scale", "taken"),
    [
        ("as it should be", KEYS[0], 1.0, True),
        ("from somebody who was no reducer of the slice", KEYS[2], 1.0, False),
        ("longer than what an encoding can lose", KEYS[0], 0.01, False),
        ("where the others did not move at all", KEYS[0], 0.0, False),
    ],
)
def test_what_is_handed_over_counts_within_bounds(case: str, reducer: bytes, scale: float, taken: bool) -> None:
    """What does not is left with whoever owes it."""
    _, takes, handed_over = one_reducer_then(reducer)
    mean = np.full(SLICE_VALUES, 5 * scale, np.float32)
    assert takes.make_good(mean, 0, [(KEYS[0], handed_over)], CODECS["int4"])[0] == ([KEYS[0]] if taken else [])
    assert np.array_equal(mean, np.full(SLICE_VALUES, 5 * scale, np.float32)) is not taken


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_what_is_handed_over_takes_at_most_half_of_what_an_encoding_can_lose(name: str) -> None:
    """Wherever it points, and whoever hands over with it: the rest is for what the reducer owes itself."""
    _, takes, _ = one_reducer_then(KEYS[0])
    takes.settle(Record(parts=[PartResult(num_slices=1, digest=b"d" * 32, reducer=KEYS[2])]))
    mean, codec = np.full(SLICE_VALUES, 3, np.float32), CODECS[name]

    def handed(share: float) -> HandOver:
        return HandOver((0,), KEPT.encode(mean * np.float32(-share * codec.largest_loss)))

    for shares, taken in [((0.6, 0.4), [KEYS[2]]), ((0.4, 0.2), [KEYS[0]]), ((0.25, 0.2), [KEYS[0], KEYS[2]])]:
        result = mean.copy()
        offered = [(KEYS[0], handed(shares[0])), (KEYS[2], handed(shares[1]))]
        assert takes.make_good(result, 0, offered, codec)[0] == taken
        assert float(np.linalg.norm(result - mean)) <= 0.5 * codec.largest_loss * float(np.linalg.norm(mean))


def test_reducers_of_different_slices_leave_each_other_room() -> None:
    """Each of three owes to its own slice what int2 usually loses of it."""
    takes = ReducerDebt()
    parts = [PartResult(first_slice=i, num_slices=1, digest=b"d" * 32, reducer=KEYS[i]) for i in range(3)]
    takes.settle(Record(parts=parts))
    mean = np.full(3 * SLICE_VALUES, 1, np.float32)
    owed = KEPT.encode(np.full(SLICE_VALUES, 0.4, np.float32))
    offered = [(KEYS[i], HandOver((i,), owed)) for i in range(3)]
    assert takes.make_good(mean, 0, offered, CODECS["int2"])[0] == KEYS
    np.testing.assert_allclose(mean, 1.4, rtol=0.01)


def test_what_is_owed_and_too_long_is_added_bit_by_bit() -> None:
    """Where averages got much shorter: no average is longer than its contributions allow, and nothing is lost."""
    owes, _, _ = one_reducer_then(KEYS[0])
    owed, mean = np.zeros(SLICE_VALUES, np.float32), np.full(SLICE_VALUES, 0.01, np.float32)
    owes.add_to(owed, 0)
    codec = CODECS["int4"]
    _, share_left = owes.make_good(mean, 0, [], codec)
    added = mean - np.float32(0.01)
    left = owed * np.float32(share_left)
    assert np.linalg.norm(added) == pytest.approx(codec.largest_loss * 0.01 * np.sqrt(SLICE_VALUES), rel=1e-3)
    np.testing.assert_allclose(added + left, owed, atol=1e-6)


def test_what_was_handed_over_is_owed_until_a_commit_says_that_it_was_taken() -> None:
    """And by nobody after that."""
    owes, _, handed_over = one_reducer_then(KEYS[0])
    record = Record()
    record.parts.add(num_slices=1, digest=b"e" * 32, reducer=KEYS[1])
    owes.settle(record)
    assert owes.to_hand_over(0, 1) == handed_over
    record.parts[0].handed_over_by.append(KEYS[0])
    owes.settle(record)
    assert owes.to_hand_over(0, 1) is None and owes.size_bytes == 0


def test_what_went_into_an_average_of_an_attempt_that_is_forgotten_is_not_added_again() -> None:
    """More attempts than are remembered, and the first of them is committed after all."""
    owes, _, _ = one_reducer_then(KEYS[0])
    lost = np.ones(SLICE_VALUES, np.float32)
    for number in range(1, MAX_ATTEMPTS + 2):
        owes.note((number, LEADER), 0, bytes([number]) * 32, lost)
    record = Record(opened_by=to_message((1, LEADER)))
    record.parts.add(num_slices=1, digest=b"\x01" * 32, reducer=KEYS[0])
    owes.settle(record)
    assert owes.to_hand_over(0, 1) is None


def test_reducers_of_long_ago_are_forgotten() -> None:
    debt = ReducerDebt()
    for number in range(3 * MAX_REDUCERS):
        record = Record()
        record.parts.add(num_slices=2, digest=b"d" * 32, reducer=bytes([number]) * 32)
        debt.settle(record)
    assert all(len(known) == MAX_REDUCERS for known in debt._reducers.values())


LOST = KEPT.encode(np.ones(SLICE_VALUES, np.float32))
SHORT = KEPT.encode(np.ones(100, np.float32))


@pytest.mark.parametrize(
    ("case", "slices", "encoded"),
    [
        ("a slice of another part", [4], LOST),
        ("one slice twice", [5, 5], LOST * 2),
        ("not in order", [6, 5], SHORT + LOST),
        ("too few bytes", [5], LOST[:-1]),
        ("too many bytes", [5], LOST + b"\0"),
        ("bytes without slices", [], LOST),
        ("no bytes", [5, 6], b""),
        ("bytes that no encoder writes", [5], b"\xff" * len(LOST)),
        ("slices without end", [5] * 10**5, LOST),
    ],
)
def test_what_is_handed_over_in_a_wrong_shape_is_refused(case: str, slices: list[int], encoded: bytes) -> None:
    """The part has slice 5, and 100 values of slice 6."""
    check_handed_over(5, SLICE_VALUES + 100, HandedOver(slices=[5, 6], encoded=LOST + SHORT))
    with pytest.raises(ProtocolError):
        check_handed_over(5, SLICE_VALUES + 100, HandedOver(slices=slices, encoded=encoded))


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_no_encoding_loses_more_than_its_codec_says(name: str) -> None:
    """The worst is one large value, and half a step in all others."""
    codec, rng = CODECS[name], np.random.default_rng(0)
    for scale in (1.0, 1e-3, 1e5):
        spikes = np.full(codec.block_values, 0.5 / {"int8": 127, "int4": 7, "int2": 2}[name], np.float32)
        spikes[0] = 1
        for values in (spikes, rng.standard_normal(1000).astype(np.float32), rng.laplace(size=1000).astype(np.float32)):
            values = values * np.float32(scale)
            lost = values - codec.decode(codec.encode(values), len(values))
            assert np.linalg.norm(lost) <= codec.largest_loss * np.linalg.norm(values)
