"""Pipelines of real replicas: with drained steps they learn what one process with the whole model learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from peer.pipeline.messages import HopRules
from peer.training import model
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from swarm.run_spec import Inner
from swarm.sharding import from_sizes, whole
from tests.simulation.pipeline_in_memory import PeerOptions, SimulatedPipeline
from tests.simulation.virtual_time import run
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_config

CPU = torch.device("cpu")
SIZES = (2, 3, 2)
STEP_MICROBATCHES = 4
NUM_STEPS = 12
RATE = 1e-2
# The norm of a span is not that of the whole: nothing is clipped where they are compared.
INNER: dict[str, Any] = {"optimizer": "adamw", "weights": "fp32", "clip_norm": 1e9}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_of(number: int) -> np.ndarray:
    """Words that follow each other mostly: there is something to learn."""
    draw = np.random.default_rng(number)
    steps = np.where(draw.random((2, LENGTH + 1)) < 0.9, 1, draw.integers(0, VOCAB, (2, LENGTH + 1)))
    return (draw.integers(0, VOCAB, (2, 1)) + steps.cumsum(1)) % VOCAB


def whole_curve(family: str) -> list[float]:
    """Loss of each inner step of one process with the whole model in fp32."""
    config = small_config(family)
    built = model.build_span(config, whole(NUM_LAYERS))
    replica = Replica(built, model.layout_of(built), Inner(**INNER), CPU)
    replica.load(model.initial_anchor(config, 3))
    steps = []
    for number in range(NUM_STEPS):
        first = number * STEP_MICROBATCHES
        tokens = np.concatenate([batch_of(first + index) for index in range(STEP_MICROBATCHES)])
        steps.append(replica.step(tokens, RATE).loss)
    return steps


def pipeline_curve(family: str, codec: str, replica_type: type[Any], **inner: Any) -> list[float]:
    """Loss of each inner step, by the answers to its microbatches, of a pipeline with one replica per span."""
    config = small_config(family)
    rules = HopRules(sequence_length=LENGTH, max_sequences=2, width=config.hidden_size, vocab_size=VOCAB, codec=codec)
    losses: dict[int, float] = {}

    async def main() -> None:
        pipeline = SimulatedPipeline(len(SIZES), rules=rules)
        pipeline.batch_of = batch_of
        options = PeerOptions(step_microbatches=STEP_MICROBATCHES, max_in_flight=3)
        for shard, span in enumerate(from_sizes(SIZES)):
            built = model.build_span(config, span)
            replica = replica_type(built, model.layout_of(built), Inner(**inner), CPU)
            replica.load(model.initial_anchor(config, 3, span))
            await pipeline.add(shard, options, replica)
        pipeline.limit = NUM_STEPS * STEP_MICROBATCHES
        await pipeline.until(pipeline.limit)
        await pipeline.finish_steps()
        for peer in pipeline.peers:
            assert [len(stepped.microbatch_ids) for stepped in peer.steps] == [STEP_MICROBATCHES] * NUM_STEPS
        losses.update(enumerate(stepped.result.loss for stepped in pipeline.peers[0].steps))
        # Each span was told the same losses, whichever way answers came back.
        for peer in pipeline.peers[1:]:
            assert [stepped.result.loss for stepped in peer.steps] == pytest.approx(list(losses.values()))

    run(main())
    return [losses[number] for number in range(NUM_STEPS)]


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_in_fp32_the_loss_curve_is_the_whole_models(family: str) -> None:
    """To 1e-5 over 12 inner steps of 4 microbatches, three of them in flight at once."""
    wanted = whole_curve(family)
    assert wanted[-1] < 0.9 * wanted[0]
    assert pipeline_curve(family, "fp32", Replica, **INNER) == pytest.approx(wanted, rel=1e-5)


# Most that a step's loss may differ, relative, over the steps that a small model makes here.
BOUNDS = {"bf16": 0.005, "int8": 0.01, "int4": 0.1}


@pytest.mark.parametrize("codec", BOUNDS)
def test_with_few_bytes_a_token_the_loss_curve_stays_close(codec: str) -> None:
    wanted = whole_curve("llama")
    assert pipeline_curve("llama", codec, Replica, **INNER) == pytest.approx(wanted, rel=BOUNDS[codec])


def test_replicas_in_8_bits_learn_over_an_int8_wire() -> None:
    """As far as the whole model in fp32 with the same clipping comes, but for a few hundredths."""
    curve = pipeline_curve("llama", "int8", Int8Replica)
    assert curve[-1] == pytest.approx(whole_curve("llama")[-1], rel=0.05)
