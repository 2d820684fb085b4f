"""A replica among others that runs out of memory goes on: in pieces, whose gradients are the whole microbatch's."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from peer.pipeline.messages import Answer, Entering, HopRules
from peer.pipeline.steps import Steps
from swarm.errors import Busy, ResourceError
from tests.simulation.pipeline_in_memory import PeerOptions, SimulatedPipeline
from tests.simulation.virtual_time import run
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_config
from tests.unit.test_passes import RATE, Make, both, fp32_spans, int8_spans, microbatch, step, there_and_back

SIZES = (2, 3, 2)
BATCHES = [np.random.default_rng(seed).integers(0, VOCAB, (4, LENGTH + 1)) for seed in range(6)]


def scarce(replica: Any, largest: int, at_once: int = 10**9) -> list[int]:
    """Activations of ``largest`` sequences fit, and of ``at_once`` forwards; what was computed to be learned from."""
    asked: list[int] = []

    def refuse(_: Any, __: Any, given: Any) -> None:
        if torch.is_grad_enabled():
            asked.append(len(given.get("input_ids", given.get("inputs_embeds"))))
            if asked[-1] > largest or len(asked) > at_once:
                raise torch.OutOfMemoryError("simulated")

    replica._model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    return asked


def learned(replica: Any) -> np.ndarray:
    moved: np.ndarray = replica.movement()[:]
    return moved


@both
@pytest.mark.parametrize("sizes", [(NUM_LAYERS,), SIZES], ids=str)
def test_in_pieces_a_replica_learns_what_it_would_have_learned(make: Make, sizes: tuple[int, ...]) -> None:
    """In fp32 to rounding; in 8 bits gradients of pieces round differently on their way through bf16."""
    ample, short = make("llama", sizes, clip_norm=1e9), make("llama", sizes, clip_norm=1e9)
    asked = [scarce(replica, largest=1) for replica in short]
    for number in range(2):
        wanted = step(ample, BATCHES[number : number + 1])
        assert step(short, BATCHES[number : number + 1]) == pytest.approx(wanted, rel=1e-3)
    for replica, other, sequences in zip(ample, short, asked, strict=True):
        assert sequences == [4, 2, *[1] * 8]
        if make is fp32_spans:
            apart = np.linalg.norm(learned(replica) - learned(other))
            assert apart < 1e-3 * np.linalg.norm(learned(replica))
        else:
            assert np.corrcoef(learned(replica), learned(other))[0, 1] > 0.8


@both
def test_others_that_are_under_way_come_back_and_what_found_no_memory_is_asked_for_again(make: Make) -> None:
    """It is no fault of the microbatch: it stays as large, and nothing is kept of it."""
    [replica] = make("llama", (NUM_LAYERS,))
    asked = scarce(replica, largest=4, at_once=1)
    replica.begin_step(RATE)
    first = replica.forward(microbatch(BATCHES[0]))
    with pytest.raises(Busy, match="beside others"):
        replica.forward(microbatch(BATCHES[1]))
    again = replica.forward(microbatch(BATCHES[1]))
    assert replica.backward(first, None).loss > 0
    del asked[:]
    assert replica.backward(again, None).loss > 0 and asked == [4]
    assert replica.finish_step(2).ok


@both
def test_memory_that_runs_out_on_the_way_back_spoils_that_step_alone(make: Make) -> None:
    [replica] = make("llama", (NUM_LAYERS,))
    fail = [True]

    def refuse_once(gradient: torch.Tensor) -> torch.Tensor:
        if fail.pop() if fail else False:
            raise torch.OutOfMemoryError("simulated")
        return gradient

    embedding = replica._model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, output: output.register_hook(refuse_once) and None)
    replica.begin_step(RATE)
    with pytest.raises(Busy, match="smaller pieces"):
        there_and_back([replica], BATCHES[:1])
    replica.drop_step()
    before = learned(replica).copy()
    assert step([replica], BATCHES[:1])
    assert not np.array_equal(learned(replica), before)


@pytest.mark.parametrize("lands", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["asked again", "another first"])
def test_what_matrices_learned_as_they_were_passed_before_memory_ran_out_is_not_learned_again(
    order: tuple[int, int], lands: bool
) -> None:
    """Where an inner step is one microbatch; whoever asks again is answered, and others have steps of their own.

    Also where an anchor lands in between, which ends what step there is.
    """
    [replica] = int8_spans("llama", (NUM_LAYERS,))
    fail = [True]

    def refuse_once(gradient: torch.Tensor) -> torch.Tensor:
        if fail.pop() if fail else False:
            raise torch.OutOfMemoryError("simulated")
        return gradient

    middle = replica._model.base_model.layers[NUM_LAYERS // 2]
    middle.register_forward_pre_hook(lambda _, given: given[0].register_hook(refuse_once) and None)
    steps = Steps(replica, lambda: RATE, 1)

    def pass_through(number: int) -> Answer:
        given = Entering(microbatch_id=bytes([number]) * 16, tokens=BATCHES[number], time_left_s=1.0)
        return steps.backward(given, steps.forward(given), None, steps.generation)

    at_first = learned(replica)
    with pytest.raises(Busy, match="smaller pieces"):
        pass_through(0)
    before = learned(replica)
    assert not np.array_equal(before, at_first)
    if lands:
        assert steps.finish() is None
    for number in order:
        assert pass_through(number).loss > 0
        assert (steps.finish() is None) == (number == 0)
        after = learned(replica)
        assert np.array_equal(after, before) == (number == 0)
        before = after


@both
def test_one_sequence_that_does_not_fit_needs_the_person(make: Make) -> None:
    [replica] = make("llama", (NUM_LAYERS,))
    scarce(replica, largest=0)
    replica.begin_step(RATE)
    with pytest.raises(ResourceError, match="one sequence at a time"):
        there_and_back([replica], BATCHES[:1])


def test_where_an_inner_step_is_one_microbatch_its_pieces_are_learned_from_together() -> None:
    """Matrices that would learn as they are passed wait for all pieces."""
    [ample], [short] = int8_spans("llama", (NUM_LAYERS,)), int8_spans("llama", (NUM_LAYERS,))
    scarce(short, largest=2)
    for replica in (ample, short):
        replica.begin_step(RATE, 1)
        there_and_back([replica], BATCHES[:1])
        assert replica.finish_step(1).ok
    assert np.corrcoef(learned(ample), learned(short))[0, 1] > 0.9


@both
@pytest.mark.parametrize("short_of_memory", range(3))
def test_a_pipeline_goes_on_when_a_peer_of_it_runs_out_of_memory(make: Make, short_of_memory: int) -> None:
    """Several microbatches are under way then; all are trained on, none counts twice."""
    rules = HopRules(
        sequence_length=LENGTH, max_sequences=4, width=small_config("llama").hidden_size, vocab_size=VOCAB, codec="fp32"
    )

    async def main() -> None:
        pipeline = SimulatedPipeline(len(SIZES), rules=rules)
        pipeline.batch_of, pipeline.limit = lambda number: BATCHES[number % len(BATCHES)], 12
        for shard, replica in enumerate(make("llama", SIZES)):
            await pipeline.add(shard, PeerOptions(step_microbatches=4, max_in_flight=3), replica)
        asyncio.get_running_loop().call_later(1.0, scarce, pipeline.peers[short_of_memory].replica, 2)
        await pipeline.until(12)
        await pipeline.finish_steps()
        assert len(pipeline.answers) == 12 and all(np.isfinite(answer.loss) for _, answer in pipeline.answers)
        for peer in pipeline.peers:
            assert set(peer.counted.values()) <= {1} and len(peer.counted) >= 8
            assert peer.hop.parts.gate.in_flight == 0

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(main(), at_most_s=36_000)
    finally:
        torch.set_num_threads(threads)


def test_an_evaluation_goes_in_the_same_pieces() -> None:
    [replica] = fp32_spans("llama", (NUM_LAYERS,))
    scarce(replica, largest=2)
    anchor = replica.read()
    wanted = replica.measure(microbatch(BATCHES[0]), (anchor,)).loss
    replica.begin_step(RATE)
    there_and_back([replica], BATCHES[:1])
    replica.drop_step()
    assert replica.measure(microbatch(BATCHES[0]), (anchor,)).loss == pytest.approx(wanted, rel=1e-6)
