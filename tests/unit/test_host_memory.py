"""A replica's host memory over a whole round, counted while it is allocated, against the memory plan."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.p2p.spill import Spill
from peer.rounds import exchange, planning
from peer.rounds.paxos import to_message
from peer.rounds.planning import split_parts
from peer.rounds.reducer_debt import ReducerDebt
from peer.rounds.round_actions import Reduce
from peer.rounds.shard import ReplicaSnapshot, Settling, Shard
from peer.training import model
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from swarm import digest, memory_plan
from swarm.files import Kept
from swarm.log import MAX_PARTS
from swarm.memory_plan import MemoryPlan, Working, plan
from swarm.presets import PRESETS, preset
from swarm.proto.round_pb2 import Member, PartResult, Record, Share
from swarm.run_spec import Inner
from swarm.sharding import whole
from tests.unit.live_bytes import LiveBytes
from tests.unit.small_models import LENGTH, NUM_LAYERS, small_config
from tests.unit.test_shard import SPEC

MEMBERS = [bytes([i]) * 32 for i in range(1, 4)]
# Large enough that a part is a part, and constants are little.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704}
TOLERANCE = 0.10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Meter:
    """The most that numpy (through Python's allocator) and torch held at once, phase by phase."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self._numpy, self._torch = tracemalloc.get_traced_memory()[0], live.now
        self.peaks: dict[str, int] = {}

    def measure(self, phase: str, work: Callable[[], Any]) -> Any:
        tracemalloc.reset_peak()
        self._live.peak = self._live.now
        result = work()
        self.peaks[phase] = tracemalloc.get_traced_memory()[1] - self._numpy + self._live.peak - self._torch
        return result


def offered(shard: Shard, snapshot: ReplicaSnapshot, spill: Spill) -> tuple[Record, dict[bytes, Kept]]:
    """What becomes of a snapshot that three members offer alike: encoded, averaged and kept part by part."""
    ballot = (1, MEMBERS[0])
    record, parts = Record(round=1, opened_by=to_message(ballot)), {}
    snapshot.offer_to(ballot)
    # One reducer has the largest parts, and the plan knows no better.
    for part in split_parts([Member(peer_key=MEMBERS[0], contributes=True)], {}, shard.num_slices):
        encoded = spill.put(shard.encode(snapshot, part))
        contributions = tuple((Share(peer_key=key, weight_tokens=10), snapshot.codec, encoded) for key in MEMBERS)
        work = Reduce(ballot, 0, part.first_slice, part.num_slices, contributions)
        told, average = shard.reduce(work)
        result = PartResult(first_slice=part.first_slice, num_slices=part.num_slices, shares=told.shares)
        result.digest = digest.sha256(average)
        record.parts.append(result)
        parts[result.digest] = spill.put(average)
    return record, parts


def live_a_round(replica: Any, anchor: Callable[[], np.ndarray], meter: Meter, folder: Path) -> Shard:
    """Two rounds: in the second there is debt, momentum, and movement carried over the first."""
    spill = Spill(folder)
    shard: Shard = meter.measure("begin", lambda: Shard(SPEC, 0, anchor()))
    shard.reducer_debt.keep = spill.put
    for _ in range(2):
        movement = meter.measure("snapshot", replica.movement)
        snapshot = meter.measure("offer", lambda m=movement: shard.offer(m, 10))
        record, parts = meter.measure("encode and average", lambda s=snapshot: offered(shard, s, spill))
        settling = Settling(snapshot, MEMBERS[0])
        assert meter.measure("apply", lambda r=record, p=parts, s=settling: shard.apply(r, p, s))
        meter.measure("land", lambda m=movement: replica.land(shard.anchor, m))
        del movement, snapshot, settling
    return shard


def planned_for(weights: Any) -> MemoryPlan:
    config = small_config("llama", **SIZES)
    numbers = model.measure(config, batch=1, sequence=LENGTH, in_bf16=False)
    return plan(numbers, whole(NUM_LAYERS), Working(weights=weights))


def test_a_whole_round_of_an_8_bit_replica_takes_what_the_plan_says(tmp_path: Path) -> None:
    """No phase takes more than the plan's total, and the highest comes within a tenth of it."""
    planned = planned_for("int8")
    assert planned.num_values > 4_000_000
    config = small_config("llama", **SIZES)
    tracemalloc.start()
    try:
        with LiveBytes() as live:
            built = model.build_model(config, 0)
            replica = Int8Replica(built, model.layout_of(built), Inner(), torch.device("cpu"))
            del built
            replica.load(np.zeros(planned.num_values, np.float32))
            meter = Meter(live)
            shard = live_a_round(replica, lambda: np.zeros(planned.num_values, np.float32), meter, tmp_path)
    finally:
        tracemalloc.stop()
    # What the replica had packed before the meter began.
    highest = max(meter.peaks.values()) + planned.host["start"]
    # Nothing is fetched here.
    expected = planned.host_bytes - planned.host["parts being fetched"]
    assert abs(expected - highest) <= TOLERANCE * highest, (expected, highest, meter.peaks)
    assert max(meter.peaks.values()) + planned.host["start"] <= planned.host_bytes
    assert shard.momentum.nbytes == planned.host["momentum"]
    assert shard.feedback is not None and shard.feedback.nbytes == planned.host["feedback"]
    assert shard.reducer_debt.size_bytes > planned.num_values, "all that averages lost is owed, on disk"


def test_where_the_debt_of_averages_lies_takes_what_the_plan_says(tmp_path: Path) -> None:
    """A peer that averages everything, while the second round is not decided yet."""
    slices = 512
    lost = np.ones(slices * planning.SLICE_VALUES, np.float32)
    record = Record(opened_by=to_message((1, MEMBERS[0])), parts=[PartResult(num_slices=slices, digest=b"d")])
    spill = Spill(tmp_path)

    def two_rounds(debt: ReducerDebt) -> ReducerDebt:
        debt.keep = spill.put
        debt.note((1, MEMBERS[0]), 0, b"d", lost)
        debt.settle(record)
        debt.note((2, MEMBERS[0]), 0, b"d", lost)
        return debt

    two_rounds(ReducerDebt())  # what is made once is not of the debt
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        debt = two_rounds(ReducerDebt())
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert debt.size_bytes > 0
    expected = memory_plan.DEBT_BYTES_PER_SLICE * slices
    assert abs(expected - taken) <= TOLERANCE * taken, (expected, taken)


@pytest.mark.parametrize(("weights", "kind"), [("int8", Int8Replica), ("fp32", Replica)])
def test_what_a_replica_keeps_on_the_host_is_what_the_plan_says(weights: str, kind: Any) -> None:
    """Item by item, in the middle of a round."""
    config = small_config("llama", hidden_size=128, intermediate_size=352)
    numbers = model.measure(config, batch=1, sequence=LENGTH, in_bf16=False)
    planned = plan(numbers, whole(NUM_LAYERS), Working(weights=weights))  # type: ignore[arg-type]
    built = model.build_model(config, 0)
    replica = kind(built, model.layout_of(built), Inner(weights=weights), torch.device("cpu"))
    anchor = model.initial_anchor(config, 0)
    replica.land(anchor, replica.movement())
    movement = replica.movement()
    real = {
        "start": movement.start.size_bytes if weights == "int8" else replica._anchor.nbytes,
        "snapshot": movement.now.size_bytes if weights == "int8" else movement.nbytes,
        "carried": movement.carried.size_bytes if weights == "int8" else 0,
    }
    for name, size in real.items():
        assert abs(planned.host[name] - size) <= 0.02 * size, name


def test_landing_makes_nothing_new_but_a_tile(tmp_path: Path) -> None:
    """Start and carried movement are written where they lie: the snapshot's room is free afterwards."""
    config = small_config("llama", hidden_size=128, intermediate_size=352)
    built = model.build_model(config, 0)
    replica = Int8Replica(built, model.layout_of(built), Inner(), torch.device("cpu"))
    anchor = model.initial_anchor(config, 0)
    replica.land(anchor, replica.movement())
    before = [entry.codes.ctypes.data for entry in (*replica._start.entries, *replica._carried.entries)]
    movement = replica.movement()
    replica.land(anchor, movement)
    assert [e.codes.ctypes.data for e in (*replica._start.entries, *replica._carried.entries)] == before
    now, start = replica.read(), replica._start[:]
    np.testing.assert_array_equal(now, start)


def test_the_plan_knows_how_rounds_are_cut() -> None:
    assert memory_plan.PART_VALUES == planning.MAX_PART_SLICES * planning.SLICE_VALUES
    assert memory_plan.SLICE_VALUES == planning.SLICE_VALUES
    assert memory_plan.PARTS_PER_REDUCER == planning.PARTS_PER_REDUCER
    assert memory_plan.FETCHED_PARTS == exchange.MAX_FETCHES
    for num_members in (1, 3, 16, 32):
        members = [Member(peer_key=bytes([i]) * 32, contributes=True) for i in range(num_members)]
        slices = 10**5
        largest = max(part.num_slices for part in split_parts(members, {}, slices))
        assert largest <= slices // memory_plan.PARTS_OF_A_LARGE_SHARD + 1 and MAX_PARTS == 64


@pytest.mark.parametrize("name", PRESETS)
def test_host_memory_is_at_most_10_bytes_a_parameter(name: str) -> None:
    """Of every preset; a model of less than 10 million has its work on a part besides, 30 MB at most."""
    made = preset(name, "run")
    config = model.build_config(made, 32_000)
    numbers = model.measure(config, batch=1, sequence=64, in_bf16=True)
    planned = plan(numbers, whole(len(numbers.layers)), Working())
    work = planned.host["a part at work"] + planned.host["parts being fetched"]
    kept = planned.host_bytes - work
    assert kept / planned.num_values <= 9.2
    assert planned.host_bytes / planned.num_values <= 10.0 or (planned.num_values < 10**7 and work < 30 * 10**6)
