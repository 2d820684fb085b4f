"""What counts towards an inner step, and how computations take turns."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peer.pipeline import steps as steps_module
from peer.pipeline.messages import Answer, Entering
from peer.pipeline.slot import Slot
from peer.pipeline.steps import Steps
from peer.training.microbatches import Trained
from swarm.errors import Busy, SwarmError
from tests.simulation.pipeline_in_memory import FakeReplica

TOKENS = np.zeros((1, 3), np.int64)
CAME = Answer(loss=3.0, gradient_BLH=torch.ones(1, 2, 4))


def entering(name: str) -> Entering:
    return Entering(microbatch_id=name.encode().ljust(16), tokens=TOKENS, time_left_s=1.0)


def steps_of(replica: Any = None, number: int = 4) -> Steps:
    return Steps(replica or FakeReplica(has_embedding=False, has_head=False), lambda: 0.1, number)


def pass_through(steps: Steps, name: str, came: Answer = CAME) -> Answer:
    given = entering(name)
    return steps.backward(given, steps.forward(given), came, steps.generation)


def test_a_microbatch_counts_once_however_often_it_comes_also_after_the_step() -> None:
    steps = steps_of()
    for name in ("a", "b", "a", "a"):
        assert pass_through(steps, name).gradient_BLH is not None
    stepped = steps.finish()
    assert stepped is not None and [name.strip() for name in stepped.microbatch_ids] == [b"a", b"b"]
    assert stepped.num_tokens == 4 and stepped.result.loss == 3.0
    pass_through(steps, "b")
    assert steps.finish() is None


def test_microbatches_that_enter_later_count_in_the_shards_that_they_passed() -> None:
    """Two passed all shards, three the third only; each learns from the mean of its own."""

    class Recording(FakeReplica):
        told: Any = None

        def finish_step(self, num_microbatches: int, later: Any = ()) -> Any:
            self.told = (num_microbatches, list(later))
            return super().finish_step(num_microbatches + sum(count for _, count in later))

    replica, values = Recording(has_embedding=True, has_head=True), slice(20, 30)
    steps = Steps(replica, lambda: 0.1, 5, {1: slice(10, 30), 2: values})
    for name, shard in zip("abcde", (0, 2, 0, 2, 2), strict=True):
        given = replace(entering(name), first_shard=shard)
        steps.backward(given, steps.forward(given), None, steps.generation)
    stepped = steps.finish()
    assert replica.told == (2, [(values, 3)])
    assert stepped is not None and (stepped.num_tokens, stepped.entered_later) == (10, {2: 6})


def test_one_that_was_on_its_way_during_an_inner_step_is_dropped() -> None:
    steps = steps_of()
    given = entering("a")
    passed, generation = steps.forward(given), steps.generation
    pass_through(steps, "b")
    steps.finish()
    with pytest.raises(Busy, match="dropped"):
        steps.backward(given, passed, CAME, generation)
    assert steps.num_gathered == 0
    pass_through(steps, "a")
    assert steps.num_gathered == 1


def test_a_loss_that_is_not_finite_counts_nowhere() -> None:
    steps = steps_of()
    answer = pass_through(steps, "a", Answer(loss=math.nan, gradient_BLH=None))
    assert math.isnan(answer.loss) and steps.num_gathered == 0 and steps.finish() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_gradient_that_cannot_travel_is_answered_as_nan_and_spoils_its_inner_step(value: float) -> None:
    class Overflowing(FakeReplica):
        def backward(self, passed: Any, gradient_BLH: Any, *, counts: bool = True) -> Trained:
            trained = super().backward(passed, gradient_BLH, counts=counts)
            return Trained(loss=trained.loss, gradient_BLH=torch.full((1, 2, 4), value))

    steps = steps_of(Overflowing(has_embedding=False, has_head=True))
    answer = pass_through(steps, "a")
    assert math.isnan(answer.loss) and answer.gradient_BLH is None and steps.num_gathered == 0
    assert steps._gathered.is_spoiled and steps.finish() is None


def test_a_way_back_that_breaks_off_spoils_its_inner_step_alone() -> None:
    class Breaking(FakeReplica):
        is_broken = False

        def backward(self, passed: Any, gradient_BLH: Any, *, counts: bool = True) -> Trained:
            if self.is_broken:
                raise SwarmError("out of memory")
            return super().backward(passed, gradient_BLH, counts=counts)

    replica = Breaking(has_embedding=False, has_head=False)
    steps = steps_of(replica)
    pass_through(steps, "a")
    replica.is_broken = True
    with pytest.raises(SwarmError, match="out of memory"):
        pass_through(steps, "b")
    replica.is_broken = False
    assert steps.finish() is None and replica.version == 0
    pass_through(steps, "c")
    assert steps.finish() is not None and replica.version == 1


def test_ids_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "MAX_REMEMBERED", 2)
    steps = steps_of()
    for name in ("a", "b", "c", "b"):
        pass_through(steps, name)
    assert steps.num_gathered == 3 and len(steps._counted) == 2


def run_slot(main: Any) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main(), 10)

    asyncio.run(bounded())


def test_ways_back_come_first() -> None:
    async def main() -> None:
        order: list[str] = []
        free = asyncio.Event()

        async def compute(function: Any) -> Any:
            await free.wait()
            return function()

        slot = Slot(compute)
        names = [("first", False), ("there", False), ("there too", False), ("back", True), ("back too", True)]
        jobs = []
        for name, is_way_back in names:
            jobs.append(asyncio.ensure_future(slot.run(lambda name=name: order.append(name), is_way_back=is_way_back)))
            await asyncio.sleep(0)
        free.set()
        await asyncio.gather(*jobs)
        assert order == ["first", "back", "back too", "there", "there too"]

    run_slot(main)


def test_one_who_is_cancelled_leaves_the_slot_only_when_its_computation_ended() -> None:
    """Nobody else computes meanwhile; those who wait and are cancelled give their turn on."""

    async def main() -> None:
        running, most = 0, 0
        free = asyncio.Event()

        async def compute(function: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await free.wait()
            running -= 1
            return function()

        slot, done = Slot(compute), []
        jobs = []
        for number in range(4):
            jobs.append(asyncio.ensure_future(slot.run(lambda number=number: done.append(number))))
            await asyncio.sleep(0)
        jobs[0].cancel()
        jobs[2].cancel()
        await asyncio.sleep(0)
        assert not jobs[0].done()
        free.set()
        came = await asyncio.gather(*jobs, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in came] == [True, False, True, False]
        assert done == [0, 1, 3] and most == 1

    run_slot(main)


def test_an_error_of_a_computation_reaches_its_owner_and_frees_the_slot() -> None:
    async def main() -> None:
        async def compute(function: Any) -> Any:
            return function()

        slot = Slot(compute)
        with pytest.raises(ZeroDivisionError):
            await slot.run(lambda: 1 // 0)
        assert await slot.run(lambda: 5) == 5

    run_slot(main)
