"""Pipelines of simulated peers: every microbatch is trained on, each counts once, whoever dies, stalls or is slow."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from peer.pipeline.messages import TRAIN_METHOD, Entering
from peer.training.microbatches import Trained
from swarm.errors import Busy, NetworkError, NotAdmitted, ProtocolError
from swarm.identity import Identity
from tests.simulation.pipeline_in_memory import FakeReplica, PeerOptions, SimulatedPeer, SimulatedPipeline
from tests.simulation.virtual_time import run


def assert_accounts_add_up(pipeline: SimulatedPipeline) -> None:
    """All that was read was answered once; nothing was learned twice, or from a mixture of weights."""
    assert sorted(number for number, _ in pipeline.answers) == list(range(pipeline.num_read))
    for peer in pipeline.peers:
        assert peer.replica.mixed == 0
        assert set(peer.counted.values()) <= {1}
        assert peer.replica.learned == sum(peer.counted.values())
        assert peer.hop.parts.gate.in_flight == 0 or not peer.transport.alive


def learned_by(peers: list[SimulatedPeer]) -> set[bytes]:
    return {name for peer in peers for name in peer.counted}


def live(main: Coroutine[Any, Any, None]) -> None:
    run(main, at_most_s=36_000)


def test_every_microbatch_goes_through_all_spans_and_back_once() -> None:
    async def main() -> None:
        pipeline = SimulatedPipeline(3)
        for shard in range(3):
            await pipeline.add(shard)
        pipeline.limit = 40
        await pipeline.until(40)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert all(answer.loss == 1.0 for _, answer in pipeline.answers)
        for peer in pipeline.peers:
            assert [len(stepped.microbatch_ids) for stepped in peer.steps] == [8] * 5
        assert len({frozenset(learned_by([peer])) for peer in pipeline.peers}) == 1

    live(main())


def test_a_whole_model_is_a_pipeline_without_a_way_onward() -> None:
    """Nothing is sent at all."""

    async def main() -> None:
        pipeline = SimulatedPipeline(1)
        peer = await pipeline.add(0, PeerOptions(step_microbatches=1, max_in_flight=1))
        pipeline.limit = 10
        await pipeline.until(10)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert len(peer.steps) == 10 and peer.transport.traffic() == (0, 0)

    live(main())


def test_several_microbatches_are_under_way_at_once() -> None:
    """With as many in flight as spans, peers compute most of the time: no slot is held while one waits."""

    async def main() -> None:
        pipeline = SimulatedPipeline(4, latency_s=0.001)
        for shard in range(4):
            await pipeline.add(shard, PeerOptions(step_microbatches=1000, max_in_flight=8))
        pipeline.limit = 100
        began_s = asyncio.get_running_loop().time()
        await pipeline.until(100)
        elapsed_s = asyncio.get_running_loop().time() - began_s
        assert [peer.slot.computed_s / elapsed_s > 0.85 for peer in pipeline.peers[:3]] == [True] * 3

    live(main())


@pytest.mark.parametrize("dies_s", [3.0, 5.05, 7.5])
def test_a_replica_that_dies_loses_no_microbatch(dies_s: float) -> None:
    async def main() -> None:
        pipeline = SimulatedPipeline(3)
        for shard in (0, 0, 1, 1, 2, 2):
            await pipeline.add(shard)
        pipeline.limit = 120
        await asyncio.sleep(dies_s)
        for shard in (1, 2):
            pipeline.replicas_of(shard)[0].kill()
        await pipeline.until(120)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        # What the dead learned since their last inner step is lost with them, and nothing else.
        assert len(learned_by(pipeline.replicas_of(0))) == 120
        for shard in (1, 2):
            dead = pipeline.replicas_of(shard)[0]
            lost = 120 - len(learned_by(pipeline.replicas_of(shard)))
            assert lost <= dead.hop.parts.steps.num_gathered + dead.hop.parts.gate.max_in_flight

    live(main())


def test_a_stalled_replica_is_left_for_another_and_tried_again() -> None:
    """It takes connections and never answers; later it does."""

    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        for shard in (0, 1, 1):
            await pipeline.add(shard)
        stalled = pipeline.replicas_of(1)[0]
        pipeline.limit = 400
        await pipeline.until(30)
        pipeline.network.stalled.add(stalled.key)
        await pipeline.until(150)
        answered_before = sum(stalled.counted.values())
        pipeline.network.stalled.clear()
        await pipeline.until(400)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert sum(stalled.counted.values()) > answered_before + 20

    live(main())


def test_without_a_replica_of_a_span_the_run_says_so_waits_and_goes_on() -> None:
    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        first = await pipeline.add(0, PeerOptions(timeout_s=5.0))
        only = await pipeline.add(1)
        pipeline.limit = 60
        await pipeline.until(20)
        only.kill()
        pipeline.peers.remove(only)
        await asyncio.sleep(60)
        assert first.source is not None and "nobody hosts the span that begins with shard 1" in first.source.waits_for
        read = pipeline.num_read
        assert read < 60 - 10  # the data waits, too
        await asyncio.sleep(60)
        assert pipeline.num_read == read
        await pipeline.add(1)
        await pipeline.until(60)
        assert first.source.waits_for == ""
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)

    live(main())


def test_replicas_get_microbatches_in_proportion_to_their_rates() -> None:
    async def main() -> None:
        pipeline = SimulatedPipeline(2, latency_s=0.001)
        for _ in range(4):
            await pipeline.add(0, PeerOptions(cost_s=0.01, step_microbatches=1000, max_in_flight=8))
        for cost_s in (0.05, 0.1, 0.2):
            await pipeline.add(1, PeerOptions(cost_s=cost_s, step_microbatches=1000, max_in_flight=4))
        pipeline.limit = 1000
        began_s = asyncio.get_running_loop().time()
        await pipeline.until(1000)
        elapsed_s = asyncio.get_running_loop().time() - began_s
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        served = [sum(peer.counted.values()) for peer in pipeline.replicas_of(1)]
        assert 0.8 < served[0] / served[1] / 2 < 1.25 and 0.8 < served[1] / served[2] / 2 < 1.25
        # Together they could do 20 + 10 + 5 a second.
        assert 1000 / elapsed_s > 0.85 * 35

    live(main())


def test_upstream_peers_mix_over_all_replicas() -> None:
    """Every replica of a span sees microbatches of every peer of the span before."""

    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        seen: dict[bytes, set[bytes]] = {}

        def note(sender: bytes, receiver: bytes, method: str, request: bytes) -> None:
            seen.setdefault(receiver, set()).add(sender)

        pipeline.network.before_delivery.append(note)
        for shard in (0, 0, 1, 1):
            await pipeline.add(shard)
        pipeline.limit = 100
        await pipeline.until(100)
        assert [len(seen[peer.key]) for peer in pipeline.replicas_of(1)] == [2, 2]

    live(main())


def test_what_changes_weights_waits_for_what_is_in_flight_and_drops_it_past_the_deadline() -> None:
    """Answers that come later belong to other weights: they are refused, and the microbatches asked for again."""

    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        first = await pipeline.add(0, PeerOptions(drain_s=2.0, timeout_s=60.0, step_microbatches=1000))
        second = await pipeline.add(1, PeerOptions(cost_s=5.0, max_in_flight=1))
        pipeline.limit = 6
        await pipeline.until(2)
        began_s = asyncio.get_running_loop().time()

        def land() -> str:
            first.replica.version += 1
            return "landed"

        assert await first.hop.between_steps(land) == "landed"
        assert 1.5 < asyncio.get_running_loop().time() - began_s < 3.0
        assert len(first.steps) == 1  # what had counted became a step of its own
        assert first.source is not None
        await pipeline.until(6)
        assert first.source.num_repeated > 0
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert learned_by([first]) == learned_by([second])

    live(main())


def test_a_paused_peer_is_busy_and_goes_on_when_told() -> None:
    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        for shard in (0, 1, 1):
            await pipeline.add(shard)
        paused = pipeline.replicas_of(1)[0]
        paused.hop.pause()
        pipeline.limit = 60
        await pipeline.until(30)
        assert paused.replica.version == 0 and paused.hop.parts.steps.num_gathered == 0
        paused.hop.pause(is_paused=False)
        await pipeline.until(60)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert paused.replica.learned > 0

    live(main())


@pytest.mark.parametrize("seed", range(6))
def test_accounts_add_up_under_random_faults(seed: int) -> None:
    """3 spans x 3 replicas: deaths, returns, stalls and messages lost at random; one replica of each span lives on."""

    async def main() -> None:
        pipeline = SimulatedPipeline(3, seed=seed)
        chance = pipeline.random

        def lose(sender: bytes, receiver: bytes, method: str, request: bytes) -> None:
            if chance.random() < 0.05:
                raise NetworkError("lost on the way")

        pipeline.network.before_delivery.append(lose)
        options = PeerOptions(drain_s=1.0, timeout_s=10.0)
        for shard in (0, 0, 1, 1, 1, 2, 2, 2):
            await pipeline.add(shard, options)
        pipeline.limit = 300
        for _ in range(12):
            await asyncio.sleep(chance.uniform(0.5, 4))
            victims = [peer for shard in (1, 2) for peer in pipeline.replicas_of(shard)[1:] if peer.transport.alive]
            victim = chance.choice(victims)
            if chance.random() < 0.5:
                victim.kill()
                await pipeline.add(victim.shard, options)
            else:
                pipeline.network.stalled.add(victim.key)
                asyncio.get_running_loop().call_later(3.0, pipeline.network.stalled.discard, victim.key)
        await pipeline.until(300)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert len(learned_by(pipeline.replicas_of(0))) == 300

    live(main())


def test_who_is_no_peer_of_the_run_or_sends_no_microbatch_is_refused_and_takes_no_place() -> None:
    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        first, last = await pipeline.add(0), await pipeline.add(1)
        stranger = pipeline.network.join(Identity.generate())
        for _ in range(20):
            with pytest.raises(NotAdmitted, match="only peers of the run"):
                await stranger.call(last.key, TRAIN_METHOD, b"", timeout_s=5)
            with pytest.raises(ProtocolError):
                await first.transport.call(last.key, TRAIN_METHOD, b"\xff" * 50, timeout_s=5)
        assert last.hop.parts.gate.in_flight == 0
        pipeline.limit = 16
        await pipeline.until(16)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)

    live(main())


def test_a_microbatch_that_came_twice_is_answered_twice_and_counts_once() -> None:
    """The answer is late: the caller asks the same replica again while the first request is still under way."""

    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        await pipeline.add(0, PeerOptions(timeout_s=1.2, max_in_flight=1))
        slow = await pipeline.add(1, PeerOptions(cost_s=1.1, max_in_flight=2))
        pipeline.limit = 8
        await asyncio.sleep(60)
        slow.hop.parts.slot._run = pipeline.replicas_of(0)[0].hop.parts.slot._run
        await pipeline.until(8)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert not math.isnan(pipeline.answers[0][1].loss)

    live(main())


def test_what_its_caller_gave_up_on_is_not_carried_out_later() -> None:
    """It waited for microbatches under way; the peer trains on afterwards."""

    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        first = await pipeline.add(0, PeerOptions(drain_s=2.0, step_microbatches=1000))
        await pipeline.add(1, PeerOptions(cost_s=5.0, max_in_flight=1))
        pipeline.limit = 4
        await pipeline.until(1)
        carried_out: list[str] = []
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(first.hop.between_steps(lambda: carried_out.append("given up")), 0.5)
        await first.hop.between_steps(lambda: carried_out.append("wanted"))
        assert carried_out == ["wanted"]
        await pipeline.until(4)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)

    live(main())


@pytest.mark.parametrize(("step", "in_flight"), [(4, 1), (1, 8)])
def test_a_whole_model_with_room_for_one_takes_turns_with_microbatches_of_others(step: int, in_flight: int) -> None:
    """Whoever came once and does not come again costs one wait, no longer than a microbatch."""

    async def main() -> None:
        pipeline, clock = SimulatedPipeline(1), asyncio.get_running_loop().time
        peer = await pipeline.add(0, PeerOptions(step_microbatches=step, max_in_flight=in_flight))
        pipeline.limit, others, began_s = 1000, 0, clock()
        await pipeline.until(100)
        alone_s, before = clock() - began_s, len(pipeline.answers)
        while others < 50:
            await asyncio.sleep(pipeline.random.uniform(0.02, 0.05))
            with contextlib.suppress(Busy):
                peer.hop.admit()
                others += 1
                name = others.to_bytes(16, "big")
                await peer.hop.train(Entering(microbatch_id=name, tokens=np.zeros((1, 3), int), time_left_s=60))
        began_s, meanwhile = clock(), len(pipeline.answers) - before
        assert 40 <= meanwhile <= 60
        await pipeline.until(200 + meanwhile)
        assert clock() - began_s < 1.05 * alone_s

    live(main())


class NanReplica(FakeReplica):
    def backward(self, passed: Any, gradient_BLH: Any, *, counts: bool = True) -> Trained:
        return Trained(loss=math.nan, gradient_BLH=None)


def test_a_replica_that_says_nan_at_once_costs_no_microbatch() -> None:
    """However quick it is: another one is asked, and the replica is avoided."""

    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        await pipeline.add(0)
        good = await pipeline.add(1)
        liar = await pipeline.add(1, PeerOptions(cost_s=0.001), NanReplica(has_embedding=False, has_head=True))
        asked: list[bytes] = []
        pipeline.network.before_delivery.append(lambda sender, receiver, method, request: asked.append(receiver))
        pipeline.limit = 200
        await pipeline.until(200)
        await pipeline.finish_steps()
        assert_accounts_add_up(pipeline)
        assert not any(math.isnan(answer.loss) for _, answer in pipeline.answers)
        assert good.replica.learned == 200 and asked.count(liar.key) < 20

    live(main())


@pytest.mark.parametrize("number", [1, 2])
def test_a_loss_of_nan_that_all_or_two_replicas_see_is_believed(number: int) -> None:
    async def main() -> None:
        pipeline = SimulatedPipeline(2)
        await pipeline.add(0)
        for _ in range(number):
            await pipeline.add(1, replica=NanReplica(has_embedding=False, has_head=True))
        pipeline.limit = 3
        await pipeline.until(3)
        assert all(math.isnan(answer.loss) for _, answer in pipeline.answers)

    live(main())
