"""The loss of a round's anchors over the spans of several peers: the whole model's, and training goes on beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from peer.pipeline.evaluation import MAX_ANSWERED, MAX_AT_ONCE, MAX_SEQUENCES_A_ROUND, EvaluationRules
from peer.pipeline.messages import EVALUATE_METHOD, Entering, HopRules, with_time, write_request
from peer.rounds.codec import Float32
from peer.training import model
from peer.training.allowance import Allowance
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from swarm.errors import Busy, DataError, DeadlineExceeded, NotAdmitted, NotFound, ProtocolError, SwarmError
from swarm.identity import Identity
from swarm.run_spec import Inner
from swarm.sharding import from_sizes, whole
from tests.simulation.pipeline_in_memory import PeerOptions, SimulatedPeer, SimulatedPipeline
from tests.simulation.virtual_time import run
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_config

CPU = torch.device("cpu")
FAMILY, ROUND = "llama", 7
SIZES = (2, 3, 2)
INNER = {Replica: Inner(weights="fp32", optimizer="adamw"), Int8Replica: Inner()}
BATCHES = [np.random.default_rng(number).integers(0, VOCAB, (2, LENGTH + 1)) for number in range(6)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Standing:
    """Where a span's shard stands, and with which anchor."""

    anchor: Float32
    round: int = ROUND
    now_s: float = 0.0
    is_wanted: bool = False
    asked: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def anchors(self, shard: int, number: int) -> AsyncIterator[Sequence[Float32]]:
        self.asked.append(number)
        if number > self.round:
            raise Busy("busy: not there yet")
        if number < self.round:
            raise NotFound("further on")
        yield [self.anchor]

    @property
    def rules(self) -> EvaluationRules:
        allowance = Allowance(0.01, lambda: self.now_s)
        return EvaluationRules(anchors=self.anchors, allowance=allowance, is_wanted=lambda number: self.is_wanted)


@dataclass
class Swarm:
    pipeline: SimulatedPipeline
    standings: list[Standing]
    whole_anchor: Float32

    @property
    def first(self) -> SimulatedPeer:
        return self.pipeline.peers[0]

    async def loss(self, number: int = ROUND, batches: Sequence[Any] = BATCHES) -> float:
        assert self.first.evaluation is not None
        return await self.first.evaluation.mean_loss(self.standings[0].anchor, batches, number)


async def swarm_of(codec: str, kind: type[Any], sizes: tuple[int, ...] = SIZES, **options: Any) -> Swarm:
    """Replicas of anchor 3 that have to measure anchor 4."""
    config = small_config(FAMILY)
    rules = HopRules(sequence_length=LENGTH, max_sequences=2, width=config.hidden_size, vocab_size=VOCAB, codec=codec)
    pipeline, standings = SimulatedPipeline(len(sizes), rules=rules), []
    for shard, span in enumerate(from_sizes(sizes)):
        built = model.build_span(config, span)
        replica = kind(built, model.layout_of(built), INNER[kind], CPU)
        replica.load(model.initial_anchor(config, 3, span))
        standings.append(Standing(model.initial_anchor(config, 4, span)))
        wanted = PeerOptions(evaluation=standings[-1].rules, **{"step_microbatches": 4, **options})
        await pipeline.add(shard, wanted, replica)
    return Swarm(pipeline, standings, model.initial_anchor(config, 4))


def whole_loss(swarm: Swarm, kind: type[Any]) -> float:
    built = model.build_span(small_config(FAMILY), whole(NUM_LAYERS))
    loss: float = kind(built, model.layout_of(built), INNER[kind], CPU).evaluate(swarm.whole_anchor, BATCHES)
    return loss


def live(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run(main(), at_most_s=36_000)


# Most that the loss may differ, relative, by what hidden states lose between spans.
BOUNDS = {"fp32": 1e-6, "bf16": 1e-3, "int8": 2e-3, "int4": 2e-2}


@pytest.mark.parametrize("kind", [Replica, Int8Replica])
@pytest.mark.parametrize("codec", BOUNDS)
def test_the_loss_over_spans_is_the_whole_models_on_the_same_anchor(codec: str, kind: type[Any]) -> None:
    """Whatever weights the replicas have; on an fp32 wire but for the order of sums."""

    async def main() -> None:
        swarm = await swarm_of(codec, kind)
        assert await swarm.loss() == pytest.approx(whole_loss(swarm, kind), rel=BOUNDS[codec])

    live(main)


@pytest.mark.parametrize("kind", [Replica, Int8Replica])
def test_what_is_trained_meanwhile_is_the_same_bit_for_bit(kind: type[Any]) -> None:
    """Evaluations come between the ways there and back of microbatches, and leave no trace in weights or counts."""
    weights = []

    async def main(number_of_evaluations: int) -> None:
        swarm = await swarm_of("fp32", kind, max_in_flight=1)
        for standing in swarm.standings:
            standing.is_wanted = True
        pipeline = swarm.pipeline
        pipeline.batch_of, pipeline.limit = lambda number: BATCHES[number % len(BATCHES)], 12
        for number in range(number_of_evaluations):
            for standing in swarm.standings:
                standing.round = ROUND + number
            await swarm.loss(ROUND + number)
        await pipeline.until(12)
        await pipeline.finish_steps()
        assert [[len(step.microbatch_ids) for step in peer.steps] for peer in pipeline.peers] == [[4, 4, 4]] * 3
        weights.append([peer.replica.read().tobytes() for peer in pipeline.peers])

    live(lambda: main(0))
    live(lambda: main(2))
    assert weights[0] == weights[1]


def test_a_span_that_is_not_there_yet_is_waited_for_and_one_that_is_further_on_is_not_measured() -> None:
    async def main() -> None:
        swarm = await swarm_of("fp32", Replica, timeout_s=20.0)
        swarm.standings[1].round = ROUND - 1
        measuring = asyncio.ensure_future(swarm.loss())
        await asyncio.sleep(5)
        assert not measuring.done()
        swarm.standings[1].round = ROUND
        assert await measuring == pytest.approx(whole_loss(swarm, Replica), rel=1e-6)
        swarm.standings[1].round = ROUND + 2
        with pytest.raises(DeadlineExceeded):
            await swarm.loss(ROUND + 1)

    live(main)


def test_others_get_no_more_of_the_time_than_the_allowance_unless_the_run_wants_the_loss() -> None:
    """A round is begun where what was spent is made up for; and it has so many sequences, whoever asks."""

    async def main() -> None:
        swarm = await swarm_of("fp32", Replica, timeout_s=20.0)
        last = swarm.standings[-1]
        await swarm.loss()
        for standing in swarm.standings:
            standing.round = ROUND + 1
        with pytest.raises(DeadlineExceeded):
            await swarm.loss(ROUND + 1)
        asked = len(last.asked)
        last.now_s = swarm.standings[1].now_s = 1e6
        await swarm.loss(ROUND + 1)
        assert len(last.asked) == asked + len(BATCHES)
        for standing in swarm.standings:
            standing.round, standing.is_wanted = ROUND + 2, True
        await swarm.loss(ROUND + 2)
        with pytest.raises(DeadlineExceeded):
            await swarm.loss(ROUND + 2, BATCHES * (MAX_SEQUENCES_A_ROUND // 12 + 1))

    live(main)


def test_others_wait_for_a_few_evaluations_at_once_and_more_are_refused_unread() -> None:
    """Each holds one of the calls that a peer answers at once: who had all of them would keep it out of rounds."""

    async def main() -> None:
        swarm = await swarm_of("fp32", Replica)
        [middle, last] = swarm.pipeline.peers[1:]
        swarm.pipeline.network.stalled.add(last.key)
        hidden = bytes(2 * LENGTH * swarm.pipeline.rules.width * 4)
        entering = Entering(microbatch_id=b"", tokens=BATCHES[0], time_left_s=300.0, round=ROUND)
        request = with_time(write_request(entering, 1, hidden), 300.0)
        others = [await swarm.pipeline.add(0) for _ in range(3)]

        def ask(peer: SimulatedPeer, request: bytes = request) -> asyncio.Future[bytes]:
            return asyncio.ensure_future(peer.transport.call(middle.key, EVALUATE_METHOD, request, timeout_s=300))

        async def refused(calls: list[asyncio.Future[bytes]]) -> int:
            await asyncio.sleep(30)
            return sum(isinstance(call.exception(), Busy) for call in calls if call.done())

        calls = [ask(others[0]) for _ in range(64)]
        assert await refused(calls) == 64 - MAX_AT_ONCE
        calls += [ask(peer) for peer in others[1:] for _ in range(MAX_AT_ONCE)]
        assert await refused(calls) == len(calls) - MAX_ANSWERED
        with pytest.raises(Busy, match="under way"):
            await ask(swarm.first, b"no request")
        await asyncio.wait(calls)
        with pytest.raises(ProtocolError):  # those that came to nothing made room
            await ask(swarm.first, b"no request")

    live(main)


@pytest.mark.parametrize("hangs_up", [True, False])
def test_what_was_computed_for_one_that_hung_up_or_failed_is_spent_and_no_training(hangs_up: bool) -> None:
    async def main() -> None:
        swarm = await swarm_of("fp32", Replica, cost_s=1.0)
        last, standing = swarm.pipeline.peers[-1], swarm.standings[-1]
        if not hangs_up:
            standing.anchor = standing.anchor[1:]
        hidden = bytes(2 * LENGTH * swarm.pipeline.rules.width * 4)

        async def ask(number: int) -> bytes:
            standing.round = number
            entering = Entering(microbatch_id=b"", tokens=BATCHES[0], time_left_s=0.5, round=number)
            request = with_time(write_request(entering, 2, hidden), 0.5)
            timeout_s = 0.5 if hangs_up else 9.0
            return await swarm.first.transport.call(last.key, EVALUATE_METHOD, request, timeout_s=timeout_s)

        with pytest.raises(DeadlineExceeded if hangs_up else SwarmError):
            await ask(ROUND)
        await asyncio.sleep(5)
        with pytest.raises(Busy, match="lately"):
            await ask(ROUND + 1)
        assert last.slot.computed_s == 0

    live(main)


def test_only_a_peer_of_the_run_is_answered_and_only_what_is_a_microbatch_of_it() -> None:
    async def main() -> None:
        swarm = await swarm_of("fp32", Replica)
        last = swarm.pipeline.peers[-1]
        stranger = swarm.pipeline.network.join(Identity(b"s" * 32))
        with pytest.raises(NotAdmitted):
            await stranger.call(last.key, EVALUATE_METHOD, b"", timeout_s=5)
        hidden = bytes(2 * LENGTH * swarm.pipeline.rules.width * 4)
        tokens = BATCHES[0]

        async def ask(tokens: Any, shard: int = 2, number: int = ROUND, hidden: bytes = hidden) -> bytes:
            entering = Entering(microbatch_id=b"", tokens=tokens, time_left_s=5.0, round=number)
            request = with_time(write_request(entering, shard, hidden), 5.0)
            return await swarm.first.transport.call(last.key, EVALUATE_METHOD, request, timeout_s=5)

        assert await ask(tokens)
        for attempt in (ask(tokens, shard=1), ask(tokens, hidden=b""), ask(tokens[:, :-1]), ask(tokens + VOCAB)):
            with pytest.raises(ProtocolError):
                await attempt
        for number in (ROUND - 1, 0):
            with pytest.raises(NotFound):
                await ask(tokens, number=number)
        with pytest.raises(Busy):
            await ask(tokens, number=2**64 - 1)
        assert await ask(tokens), "nothing of that was counted"

    live(main)


def test_a_peer_that_leaves_answers_nobody_any_more() -> None:
    async def main() -> None:
        swarm = await swarm_of("fp32", Replica, timeout_s=5.0)
        last = swarm.pipeline.peers[-1].evaluation
        assert last is not None
        last.end()
        with pytest.raises(DeadlineExceeded):
            await swarm.loss()
        assert swarm.standings[-1].asked

    live(main)


def test_a_loss_that_is_not_finite_is_told_by_name() -> None:
    async def main() -> None:
        swarm = await swarm_of("fp32", Replica)
        swarm.standings[-1].anchor[:] = np.nan
        with pytest.raises(DataError, match="no finite loss"):
            await swarm.loss()
        with pytest.raises(DataError, match="0 validation batches"):
            await swarm.loss(batches=[])

    live(main)
