"""The trainer of a span: a whole model's is the ordinary trainer to the bit, and spans land anchors between steps."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peer.pipeline.messages import HopRules
from peer.pipeline.steps import Stepped
from peer.pipeline.trainer import SpanParts, SpanTrainer
from peer.training import model
from peer.training.between_steps import Stats
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from peer.training.microbatches import StepResult
from peer.training.trainer import Hooks, Limits, Trainer
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.run_spec import Inner
from swarm.sharding import Span, from_sizes, whole
from tests.simulation.memory_transport import MemoryNetwork
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_config

CPU = torch.device("cpu")
RULES = HopRules(sequence_length=LENGTH, max_sequences=2, width=16, vocab_size=VOCAB)
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, VOCAB, (2, LENGTH + 1))


def limited(number: int) -> Callable[[int], np.ndarray | None]:
    return lambda attempts: batch(attempts) if attempts < number else None


def replica_of(span: Span, kind: type[Any] = Int8Replica) -> Any:
    config = small_config("llama")
    built = model.build_span(config, span)
    inner = Inner(weights="int8" if kind is Int8Replica else "fp32")
    replica = kind(built, model.layout_of(built), inner, CPU)
    replica.load(model.initial_anchor(config, 3, span))
    return replica


def parts_of(network: MemoryNetwork, first: int = 0, after: int | None = None, step: int = 1) -> SpanParts:
    transport = network.join(Identity.generate())
    return SpanParts(
        transport=transport,
        rules=RULES,
        first_shard=first,
        next_shard=after,
        step_microbatches=step,
        max_in_flight=min(step, 2),
        hosts=lambda shard: {key: () for key in network.peers if key != transport.public_key},
        is_admitted=lambda key: True,
    )


def hooks_of(next_batch: Callable[[int], Any], **hooks: Any) -> Hooks:
    return Hooks(next_batch=next_batch, learning_rate=lambda: 1e-2, **hooks)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError("it did not come to this")


def live(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


async def trained(trainer: Any, steps: int) -> Stats:
    trainer.start()
    await until(lambda: trainer.stats.steps >= steps)
    stats: Stats = trainer.stats
    await trainer.stop(WAIT_S)
    return stats


def test_a_whole_model_learns_what_the_ordinary_trainer_teaches_it_bit_for_bit() -> None:
    async def main() -> None:
        replicas = [replica_of(whole(NUM_LAYERS)) for _ in range(2)]
        over_place = SpanTrainer(replicas[0], parts_of(MemoryNetwork()), hooks_of(limited(6)), Limits(num_threads=1))
        ordinary = Trainer(replicas[1], hooks_of(limited(6)), Limits(num_threads=1))
        stats = [await trained(trainer, 6) for trainer in (over_place, ordinary)]
        assert replicas[0].read().tobytes() == replicas[1].read().tobytes()
        assert (stats[0].tokens, stats[0].steps) == (stats[1].tokens, stats[1].steps)
        assert stats[0].loss_sum == pytest.approx(stats[1].loss_sum, rel=1e-6)

    live(main())


def test_spans_train_together_and_land_anchors_while_they_do() -> None:
    async def main() -> None:
        network, spans = MemoryNetwork(latency_s=0.001), from_sizes((3, 4))
        last = SpanTrainer(replica_of(spans[1]), parts_of(network, 1, None, 4), hooks_of(limited(0)), Limits())
        first = SpanTrainer(
            replica_of(spans[0]), parts_of(network, 0, 1, 4), hooks_of(limited(10_000)), Limits(num_threads=1)
        )
        for trainer in (last, first):
            trainer.start()
        await until(lambda: min(first.stats.steps, last.stats.steps) >= 3)
        for trainer, span in ((first, spans[0]), (last, spans[1])):
            snapshot = await trainer.snapshot()
            assert trainer.stats.tokens >= snapshot.stats.tokens > 0
            anchor = model.initial_anchor(small_config("llama"), 3, span) + np.float32(0.01)
            await trainer.land(anchor, snapshot.movement)
        steps = first.stats.steps
        await until(lambda: first.stats.steps >= steps + 2)
        assert first.stats.tokens_per_s > 0 and math.isfinite(first.stats.last_loss) and first.waits_for == ""
        for trainer in (first, last):
            await trainer.stop(WAIT_S)
            assert trainer.failure is None

    live(main())


def test_what_entered_later_counts_for_the_part_of_the_work_that_it_asked_for() -> None:
    """A peer is as fast however many of its microbatches come from others; who hosts what depends on it."""
    rates = []
    for own, later in ((4, 0), (2, 2), (1, 3)):
        parts = replace(parts_of(MemoryNetwork()), shares={1: 0.25})
        trainer = SpanTrainer(replica_of(whole(NUM_LAYERS)), parts, hooks_of(limited(0)), Limits())
        trainer._place.slot.computed_s = own * 1.0 + later * 0.25
        result = StepResult(loss=1.0, grad_norm=1.0, ok=True, num_microbatches=4)
        trainer._stepped(
            Stepped(result=result, num_tokens=400, microbatch_ids=(), entered_later={1: 100 * later} if later else {})
        )
        rates.append(trainer.service_tokens_per_s)
    assert rates == pytest.approx([100.0] * 3)


def test_a_paused_trainer_still_carries_out_commands() -> None:
    async def main() -> None:
        trainer = SpanTrainer(
            replica_of(whole(NUM_LAYERS)), parts_of(MemoryNetwork()), hooks_of(limited(10_000)), Limits()
        )
        trainer.start()
        await until(lambda: trainer.stats.steps >= 1)
        trainer.pause()
        steps = (await trainer.snapshot()).stats.steps
        assert await trainer.call(lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            await trainer.call(lambda: 1 // 0)
        assert trainer.stats.steps == steps
        trainer.resume()
        await until(lambda: trainer.stats.steps > steps)
        await trainer.stop(WAIT_S)
        with pytest.raises(SwarmError, match="does not run"):
            await trainer.call(lambda: 5)

    live(main())


def test_what_ends_training_is_told_and_reaches_whoever_asks() -> None:
    async def main() -> None:
        told: list[SwarmError] = []

        def next_batch(attempts: int) -> Any:
            return np.full((2, LENGTH + 1), VOCAB) if attempts == 2 else batch(attempts)

        trainer = SpanTrainer(
            replica_of(whole(NUM_LAYERS)),
            parts_of(MemoryNetwork()),
            hooks_of(next_batch, on_failed=told.append),
            Limits(),
        )
        trainer.start()
        await until(lambda: bool(told))
        assert trainer.failure is told[0] and "outside the vocabulary" in str(told[0])
        with pytest.raises(SwarmError, match="outside the vocabulary"):
            await trainer.call(lambda: 5)
        await trainer.stop(WAIT_S)

    live(main())


def test_repeated_losses_that_are_not_finite_are_told() -> None:
    async def main() -> None:
        told: list[int] = []
        replica = replica_of(whole(NUM_LAYERS), Replica)
        with torch.no_grad():
            replica._parameters[0].fill_(math.inf)
        trainer = SpanTrainer(
            replica, parts_of(MemoryNetwork()), hooks_of(limited(10_000), on_bad=told.append), Limits(max_bad_steps=3)
        )
        trainer.start()
        await until(lambda: len(told) >= 2)
        assert told[:2] == [3, 6] and trainer.stats.steps == 0 and trainer.stats.tokens == 0
        await trainer.stop(WAIT_S)

    live(main())
