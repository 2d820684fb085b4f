"""The trainer: steps in a thread, commands between them, pauses, limits, failures and the counts of tokens."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from peer.training import trainer as trainer_module
from peer.training.between_steps import Stats, after_step
from peer.training.trainer import Hooks, Limits, Trainer
from swarm.errors import ConfigError, DataError, DeadlineExceeded, ResourceError, SwarmError

BATCH = np.zeros((2, 9), np.int64)
TOKENS = 16
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Result:
    loss: float = 2.0
    grad_norm: float = 1.0
    ok: bool = True


@dataclass
class FakeReplica:
    """Weights that count the steps, and a gate: without permits a step waits (within a deadline) inside."""

    weights: np.ndarray = field(default_factory=lambda: np.zeros(3, np.float32))
    anchor: np.ndarray = field(default_factory=lambda: np.zeros(3, np.float32))
    result: Result = Result()
    error: BaseException | None = None
    rates: list[float] = field(default_factory=list)
    gate: threading.Semaphore | None = None
    inside: threading.Event = field(default_factory=threading.Event)
    threads: set[str] = field(default_factory=set)

    def load(self, anchor: np.ndarray, values: slice | None = None) -> None:
        self.weights, self.anchor = anchor.copy(), anchor.copy()

    def reset(self, anchor: np.ndarray, values: slice | None = None) -> None:
        self.load(anchor)

    def movement(self, values: slice | None = None) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        return self.weights - self.anchor

    def land(self, new_anchor: np.ndarray, snapshot: np.ndarray, values: slice | None = None) -> None:
        self.weights, self.anchor = new_anchor + (self.movement() - snapshot), new_anchor.copy()

    def step(self, tokens: np.ndarray, learning_rate: float) -> Result:
        self.inside.set()
        if self.gate is not None:
            assert self.gate.acquire(timeout=DEADLINE_S)
        if self.error is not None:
            raise self.error
        self.rates.append(learning_rate)
        if self.result.ok:
            self.weights = self.weights + np.float32(1)
        return self.result

    def evaluate(self, anchor: np.ndarray, batches: Any) -> float:
        return float(anchor.sum()) + len(batches)


class Feed:
    """Gives a batch while ``left`` lasts, and remembers which steps asked."""

    def __init__(self, left: int) -> None:
        self.left, self.asked = left, []  # type: ignore[var-annotated]

    def __call__(self, step: int) -> np.ndarray | None:
        if self.left == 0:
            return None
        self.left -= 1
        self.asked.append(step)
        return BATCH


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "what the test waits for did not happen"
        await asyncio.sleep(0.002)


def run(
    test: Callable[[Trainer], Awaitable[None]],
    replica: FakeReplica,
    feed: Callable[[int], Any],
    limits: Limits | None = None,
    **hooks: Any,
) -> Trainer:
    """Run ``test`` with a started trainer and stop it afterwards."""
    trainer = Trainer(
        replica,  # type: ignore[arg-type]
        Hooks(next_batch=feed, learning_rate=lambda: 0.5, **hooks),
        limits or Limits(),
    )

    async def body() -> None:
        trainer.start()
        try:
            await test(trainer)
        finally:
            if replica.gate is not None:
                replica.gate.release(1000)
            await trainer.stop(DEADLINE_S)
        trainer._thread.join(DEADLINE_S)
        assert not trainer._thread.is_alive()

    asyncio.run(body())
    return trainer


def test_it_steps_while_there_are_batches_and_counts_tokens() -> None:
    replica, feed = FakeReplica(), Feed(5)

    async def test(trainer: Trainer) -> None:
        await until(lambda: trainer.stats.steps == 5)
        assert trainer.stats.tokens == 5 * TOKENS
        assert trainer.stats.tokens_per_s > 0

    run(test, replica, feed)
    assert feed.asked == [0, 1, 2, 3, 4] and replica.rates == [0.5] * 5


def test_a_trainer_without_batches_waits_and_begins_when_it_is_woken() -> None:
    feed = Feed(0)

    async def test(trainer: Trainer) -> None:
        await trainer.call(lambda: None)
        assert trainer.stats.steps == 0
        feed.left = 3
        trainer.wake()
        await until(lambda: trainer.stats.steps == 3)

    run(test, FakeReplica(), feed)


def test_a_snapshot_is_a_copy_made_between_steps_by_the_trainers_thread() -> None:
    replica, feed = FakeReplica(), Feed(2)

    async def test(trainer: Trainer) -> None:
        await until(lambda: trainer.stats.steps == 2)
        snapshot = await trainer.snapshot()
        assert snapshot.movement.tolist() == [2.0] * 3
        assert (snapshot.stats.tokens, snapshot.stats.steps) == (2 * TOKENS, 2)
        snapshot.movement[:] = 9
        assert (await trainer.snapshot()).movement.tolist() == [2.0] * 3

    run(test, replica, feed)
    assert replica.threads == {"trainer"}


def test_after_landing_what_was_learned_since_the_snapshot_stays() -> None:
    replica, feed = FakeReplica(), Feed(3)

    async def test(trainer: Trainer) -> None:
        await until(lambda: trainer.stats.steps == 3)
        snapshot = await trainer.snapshot()
        feed.left = 2
        trainer.wake()
        await until(lambda: trainer.stats.steps == 5)
        await trainer.land(np.full(3, 100, np.float32), snapshot.movement)
        landed = await trainer.snapshot()
        assert landed.movement.tolist() == [2.0] * 3 and replica.weights.tolist() == [102.0] * 3
        assert landed.stats.tokens - snapshot.stats.tokens == 2 * TOKENS

    run(test, replica, feed)


def test_a_reset_replaces_the_weights_and_what_was_counted_stays() -> None:
    async def test(trainer: Trainer) -> None:
        await until(lambda: trainer.stats.steps == 4)
        await trainer.reset(np.full(3, 7, np.float32))
        snapshot = await trainer.snapshot()
        assert (snapshot.movement.tolist(), snapshot.stats.tokens) == ([0.0] * 3, 4 * TOKENS)

    run(test, FakeReplica(), Feed(4))


def test_an_evaluation_gives_its_result() -> None:
    async def test(trainer: Trainer) -> None:
        assert await trainer.evaluate(np.full(2, 3, np.float32), [BATCH, BATCH]) == 8.0

    run(test, FakeReplica(), Feed(0))


def test_a_paused_trainer_makes_no_step_but_answers() -> None:
    feed = Feed(0)

    async def test(trainer: Trainer) -> None:
        trainer.pause()
        feed.left = 4
        for _ in range(5):
            assert (await trainer.snapshot()).stats.steps == 0
        trainer.resume()
        await until(lambda: trainer.stats.steps == 4)

    run(test, FakeReplica(), feed)


def test_commands_run_in_the_order_in_which_they_were_given() -> None:
    order: list[int] = []

    async def test(trainer: Trainer) -> None:
        await asyncio.gather(*(trainer.call(lambda i=i: order.append(i)) for i in range(20)))  # type: ignore[misc]

    run(test, FakeReplica(), Feed(100))
    assert order == list(range(20))


def test_an_error_of_a_command_reaches_its_caller_and_training_goes_on() -> None:
    feed = Feed(0)

    def fail() -> None:
        raise DataError("wrong")

    async def test(trainer: Trainer) -> None:
        with pytest.raises(DataError, match="wrong"):
            await trainer.call(fail)
        feed.left = 1
        await until(lambda: trainer.stats.steps == 1)
        assert trainer.failure is None

    run(test, FakeReplica(), feed)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [(ResourceError("no memory"), ResourceError, "no memory"), (ValueError("odd"), SwarmError, "ValueError: odd")],
)
def test_an_error_of_a_step_ends_training_and_reaches_everyone(
    error: Exception, expected: type[SwarmError], message: str
) -> None:
    replica = FakeReplica(error=error, gate=threading.Semaphore(0))
    told: list[SwarmError] = []

    async def test(trainer: Trainer) -> None:
        await until(replica.inside.is_set)
        waiting = asyncio.ensure_future(trainer.snapshot())
        await asyncio.sleep(0)  # lets it queue its command behind the step
        assert replica.gate is not None
        replica.gate.release()
        with pytest.raises(expected, match=message):
            await waiting
        with pytest.raises(expected, match=message):
            await trainer.snapshot()
        assert told == [trainer.failure]

    run(test, replica, Feed(1), on_failed=told.append)


def test_an_error_of_the_data_hook_ends_training_too() -> None:
    def broken(_: int) -> None:
        raise DataError("the token shard is damaged")

    async def test(trainer: Trainer) -> None:
        await until(lambda: trainer.failure is not None)
        with pytest.raises(DataError, match="damaged"):
            await trainer.snapshot()

    run(test, FakeReplica(), broken)


def test_a_command_that_waits_too_long_is_withdrawn() -> None:
    replica = FakeReplica(gate=threading.Semaphore(0))
    ran: list[bool] = []

    async def test(trainer: Trainer) -> None:
        await until(replica.inside.is_set)
        with pytest.raises(DeadlineExceeded):
            await trainer.call(lambda: ran.append(True), timeout_s=0.01)
        assert replica.gate is not None
        replica.gate.release()
        await trainer.call(lambda: None)

    run(test, replica, Feed(1))
    assert ran == []


def test_too_many_commands_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "MAX_COMMANDS", 2)
    replica = FakeReplica(gate=threading.Semaphore(0))

    async def test(trainer: Trainer) -> None:
        await until(replica.inside.is_set)
        waiting = [asyncio.ensure_future(trainer.snapshot()) for _ in range(2)]
        await asyncio.sleep(0)  # lets both queue
        with pytest.raises(ResourceError, match="2 commands wait"):
            await trainer.snapshot()
        assert replica.gate is not None
        replica.gate.release()
        assert [snapshot.stats.steps for snapshot in await asyncio.gather(*waiting)] == [1, 1]

    run(test, replica, Feed(1))


def test_bad_steps_count_no_tokens_and_are_reported_at_the_limit() -> None:
    replica, feed = FakeReplica(result=Result(loss=math.nan, ok=False)), Feed(7)
    told: list[int] = []

    async def test(trainer: Trainer) -> None:
        await until(lambda: trainer.stats.bad_steps == 7)
        assert (trainer.stats.tokens, trainer.stats.steps, trainer.stats.consecutive_bad_steps) == (0, 0, 7)
        await trainer.reset(np.zeros(3, np.float32))
        assert trainer.stats.consecutive_bad_steps == 0
        replica.result = Result(loss=1.0)
        feed.left = 1
        await until(lambda: trainer.stats.steps == 1)
        assert trainer.stats.last_loss == 1.0

    run(test, replica, feed, Limits(max_bad_steps=3), on_bad=told.append)
    assert told == [3, 6] and feed.asked == list(range(8))


def test_the_duty_limit_leaves_the_rest_of_the_time_to_others() -> None:
    class Clock:
        """Half a second passes whenever somebody looks, so a step takes 0.5 s."""

        now_s = 0.0

        def __call__(self) -> float:
            self.now_s += 0.5
            return self.now_s

    clock, replica, feed = Clock(), FakeReplica(), Feed(2)
    starts: list[float] = []
    trainer = Trainer(
        replica,  # type: ignore[arg-type]
        Hooks(next_batch=feed, learning_rate=lambda: starts.append(clock.now_s) or 0.1),  # type: ignore[func-returns-value]
        Limits(max_duty=0.25),
        clock,
    )

    async def body() -> None:
        trainer.start()
        await until(lambda: trainer.stats.steps == 2)
        await trainer.stop(DEADLINE_S)

    asyncio.run(body())
    # A quarter of the time is for steps: three times as long as a step must pass before the next begins.
    assert starts[1] - (starts[0] + 0.5) >= 3 * 0.5


def test_the_number_of_threads_holds_in_the_trainers_thread() -> None:
    import torch

    before = torch.get_num_threads()

    async def test(trainer: Trainer) -> None:
        assert await trainer.call(torch.get_num_threads) == 1

    try:
        run(test, FakeReplica(), Feed(0), Limits(num_threads=1))
    finally:
        torch.set_num_threads(before)


def test_a_stopped_trainer_finishes_its_step_and_refuses_commands() -> None:
    replica = FakeReplica(gate=threading.Semaphore(0))

    async def test(trainer: Trainer) -> None:
        await until(replica.inside.is_set)
        waiting = asyncio.ensure_future(trainer.snapshot())
        await asyncio.sleep(0)  # lets it queue
        with pytest.raises(DeadlineExceeded):
            await trainer.stop(0.01)
        assert replica.gate is not None
        replica.gate.release()
        await trainer.stop(DEADLINE_S)
        with pytest.raises(SwarmError, match="stopped"):
            await waiting
        with pytest.raises(SwarmError, match="does not run"):
            await trainer.snapshot()

    trainer = run(test, replica, Feed(5))
    assert trainer.stats.steps == 1


def test_a_trainer_that_never_started_stops_at_once() -> None:
    trainer = Trainer(FakeReplica(), Hooks(next_batch=Feed(0), learning_rate=lambda: 0.1), Limits())  # type: ignore[arg-type]
    asyncio.run(trainer.stop(1.0))
    with pytest.raises(SwarmError, match="does not run"):
        asyncio.run(trainer.snapshot())


def test_a_program_that_ends_without_stopping_the_trainer_still_exits() -> None:
    program = (
        "from peer.training.trainer import *\n"
        "t = Trainer(None, Hooks(next_batch=lambda step: None, learning_rate=lambda: 0.1), Limits())\n"
        "t.start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_two_readings_of_the_counts_give_the_loss_between_them() -> None:
    early = after_step(Stats(), Result(loss=8.0), TOKENS, 1.0)  # type: ignore[arg-type]
    late = early
    for loss in (4.0, 2.0):
        late = after_step(late, Result(loss=loss), TOKENS, 1.0)  # type: ignore[arg-type]
    assert late.mean_loss_since(early) == 3.0 and late.mean_loss_since(Stats()) == pytest.approx(14 / 3)
    assert math.isnan(late.mean_loss_since(late))
    assert late.tokens_per_s == pytest.approx(TOKENS)


def test_the_rate_follows_a_change_within_its_window() -> None:
    stats = after_step(Stats(), Result(), 100, 1.0)  # type: ignore[arg-type]
    for _ in range(30):
        stats = after_step(stats, Result(), 300, 1.0)  # type: ignore[arg-type]
    assert 280 < stats.tokens_per_s < 300


@pytest.mark.parametrize(
    "wrong", [{"max_duty": 0.0}, {"max_duty": 1.5}, {"max_duty": math.nan}, {"num_threads": 0}, {"max_bad_steps": 0}]
)
def test_limits_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits(**wrong)


def test_the_rate_of_each_shard_counts_what_passed_it() -> None:
    """100 tokens a second come in at the first shard, 50 at the second, 25 at the third."""
    stats = Stats()
    for _ in range(60):
        stats = after_step(stats, Result(), 175, 1.0, {1: 50, 2: 25})  # type: ignore[arg-type]
    assert [stats.tokens_per_s_of(shard) for shard in range(3)] == pytest.approx([100, 150, 175])
    assert [stats.tokens_of(shard) for shard in range(3)] == [6000, 9000, 10500]
    for _ in range(60):
        stats = after_step(stats, Result(), 100, 1.0)  # type: ignore[arg-type]
    assert stats.tokens_per_s_of(0) == pytest.approx(100, rel=0.05), "once others send nothing any more"


def test_the_rate_falls_while_no_step_is_made_and_not_before_one_is_late() -> None:
    """Whoever waits for a replica of another shard would else tell for ever how fast it was."""
    quick = after_step(Stats(), Result(), 100, 1.0, {1: 40})  # type: ignore[arg-type]
    slow = after_step(Stats(), Result(), 6000, 60.0)  # type: ignore[arg-type]
    assert quick.after_idling(10.0) is quick and slow.after_idling(60.0) is slow
    idle = quick.after_idling(50.0)
    assert (idle.tokens_per_s, idle.tokens_per_s_of(0)) == pytest.approx((2.0, 1.2))
    assert slow.after_idling(120.0).tokens_per_s == pytest.approx(50)
