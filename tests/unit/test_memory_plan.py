"""The memory plan against what is really allocated, part by part, and what is decided by it."""

from __future__ import annotations

import functools
import math
import resource
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peer.training import int8_matrix, int8_modules, model, quantized
from peer.training.fp32_replica import Replica
from peer.training.inner_optimizer import MOMENT_BLOCK
from peer.training.int8_replica import Int8Replica
from peer.training.span import forward, initial_values, materialise
from swarm import memory_plan
from swarm.errors import ResourceError, SwarmError
from swarm.families import FAMILIES
from swarm.fitting import GIB, Room, choose, fits
from swarm.memory_plan import ModelNumbers, Working, plan
from swarm.run_spec import Inner
from swarm.sharding import from_sizes, spans, split, whole
from tests.unit.live_bytes import LiveBytes, bytes_of
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_config, small_spec

BATCH = 4
TOLERANCE = 0.10
MANY_WORDS = 8000
# Wide enough that matrices are most of the model, as they are where memory matters.
WIDE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 128},
    "gptj": {"n_embd": 128, "rotary_dim": 16},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512},
    "bloom": {"hidden_size": 120},
    "llama": {"hidden_size": 128, "intermediate_size": 352},
    "mistral": {"hidden_size": 128, "intermediate_size": 352},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are not worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def numbers_of(family: str, batch: int = BATCH, *, tied: bool = False, **changes: Any) -> ModelNumbers:
    config = small_config(family, tied=tied, **WIDE[family], **changes)
    return model.measure(config, batch=batch, sequence=LENGTH, in_bf16=False)


def near(planned: int, real: int) -> bool:
    return abs(planned - real) <= TOLERANCE * real


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_the_parameters_of_a_span(family: str) -> None:
    config = small_config(family)
    numbers = model.measure(config, batch=1, sequence=LENGTH, in_bf16=False)
    for span in spans(from_sizes((2, 1, 4))):
        entries = model.build_layout(config, span).entries
        assert [entry.shape for entry in entries] == list(numbers.shapes(span))
        assert numbers.num_values(span) == plan(numbers, span, Working()).num_values


@pytest.mark.parametrize("sizes", [(NUM_LAYERS,), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family: str, sizes: tuple[int, ...]) -> None:
    config = small_config(family, **WIDE[family])
    numbers = numbers_of(family)
    for span in from_sizes(sizes):
        piece = model.build_span(config, span)
        materialise(piece, initial_values(piece, 0))
        given = torch.zeros((BATCH, LENGTH), dtype=torch.long)
        value = given if span.has_embedding else torch.randn((BATCH, LENGTH, numbers.hidden), requires_grad=True)
        own = [*piece.parameters(), *piece.buffers()]
        owned = {tensor.untyped_storage()._cdata for tensor in own}
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            forward(piece, span, value)
        real = bytes_of(tensor for tensor in kept if tensor.untyped_storage()._cdata not in owned)
        assert near(memory_plan.activation_bytes(numbers, span, checkpointing=False), real), (span, real)


WAYS = [
    ("fp32", Working(weights="fp32", moments="32bit")),
    ("fp32, 8-bit moments", Working(weights="fp32")),
    ("int8", Working()),
    ("int8, checkpointing", Working(checkpointing=True)),
    ("int8, 32-bit moments", Working(moments="32bit")),
]
CASES = [
    pytest.param(family, working, None, id=f"{family}: {name}")
    for family in FAMILIES
    for name, working in WAYS
    if working.moments == "8bit" or family == "llama"
]
# With many words the head's gradient is what matters: before the layers' where it has a matrix of its own, beside them
# where it waits for the embedding's.
CASES += [
    pytest.param("llama", Working(), tied, id=f"llama: many words, {'tied' if tied else 'untied'}")
    for tied in (False, True)
]


@pytest.mark.parametrize(("family", "working", "many_words_tied"), CASES)
def test_a_replica_takes_what_the_plan_says(family: str, working: Working, many_words_tied: bool | None) -> None:
    """On the device between steps and at the peak of a step, and on the host."""
    config = small_config(family, **WIDE[family])
    if many_words_tied is not None:
        config = model.build_config(small_spec(family, tied=many_words_tied, **WIDE[family]), MANY_WORDS)
    numbers = model.measure(config, batch=BATCH, sequence=LENGTH, in_bf16=False)
    planned = plan(numbers, whole(NUM_LAYERS), working)
    inner = Inner(
        weights=working.weights,
        optimizer="adamw8bit" if working.moments == "8bit" else "adamw",
        checkpoint_activations=working.checkpointing,
    )
    kind = Int8Replica if working.weights == "int8" else Replica
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1))
    with LiveBytes() as live:
        built = model.build_model(config, 0)
        replica = kind(built, model.layout_of(built), inner, torch.device("cpu"))
        del built
        replica.step(tokens, 1e-3)
        on_host = host_bytes(replica)
        held, live.peak = live.now - on_host, 0
        replica.step(tokens, 1e-3)
    peak = live.peak - on_host
    assert near(planned.held_bytes, held), (planned.held, held)
    assert near(planned.device_bytes, peak), (planned.device_bytes, planned.phases, peak)
    assert abs(planned.host["start"] - start_bytes(replica)) <= TOLERANCE * start_bytes(replica)


def start_bytes(replica: Any) -> int:
    """What the replica remembers on the host of where it started from."""
    return replica._start.size_bytes if isinstance(replica, Int8Replica) else replica._anchor.nbytes


def host_bytes(replica: Any) -> int:
    """The part of it that torch allocated (numpy's is not counted as living)."""
    return start_bytes(replica) if isinstance(replica, Int8Replica) else 0


def test_the_plan_knows_how_the_8_bit_replica_works() -> None:
    assert memory_plan.BLOCK_VALUES == quantized.BLOCK_VALUES == MOMENT_BLOCK
    assert (memory_plan.WHOLE_VALUES, memory_plan.TILE_VALUES) == (int8_matrix.WHOLE_VALUES, int8_matrix.TILE_VALUES)
    for device, values in memory_plan.UPDATE_VALUES.items():
        assert values == int8_matrix.UPDATE_VALUES.get(device, int8_matrix.UPDATE_VALUES_ELSEWHERE)
    for device, values in memory_plan.LOGIT_VALUES.items():
        assert values == int8_modules.LOGIT_VALUES.get(device, int8_modules.LOGIT_VALUES_ELSEWHERE)


def test_int8_matrices_take_what_the_plan_says() -> None:
    shape = (300, 200)
    matrix = int8_matrix.Int8Matrix(shape, Inner(), torch.device("cpu"))
    numbers = replace(numbers_of("llama"), layers=((shape,),), embedding=(), head=(), buffer_bytes=0)
    planned = plan(numbers, whole(1), Working())
    held = planned.held_bytes - planned.held["dither"]  # one table for all matrices
    assert held == bytes_of(matrix.tensors())
    assert held / math.prod(shape) < 3.2


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer_more() -> None:
    numbers = numbers_of("llama")
    span = whole(NUM_LAYERS)
    kept = numbers.activations
    inputs = NUM_LAYERS * BATCH * LENGTH * numbers.hidden * 4
    with_it = memory_plan.activation_bytes(numbers, span, checkpointing=True)
    assert with_it == kept.embedding + inputs + max(kept.layers) + kept.head
    assert with_it < memory_plan.activation_bytes(numbers, span, checkpointing=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_grow_with_the_batch(family: str) -> None:
    one, four = (sum(numbers_of(family, batch).activations.layers) for batch in (1, 4))
    assert 3 < four / one <= 4


def test_bf16_compute_keeps_less() -> None:
    config = small_config("llama", **WIDE["llama"])
    halved, exact = (
        memory_plan.activation_bytes(
            model.measure(config, batch=2, sequence=LENGTH, in_bf16=in_bf16), whole(NUM_LAYERS), checkpointing=False
        )
        for in_bf16 in (True, False)
    )
    assert 0.5 < halved / exact < 0.9


def test_measuring_allocates_nothing_worth_mentioning() -> None:
    config = small_config("llama", hidden_size=4096, intermediate_size=11008)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    numbers = model.measure(config, batch=512, sequence=LENGTH, in_bf16=True)
    assert numbers.num_values(whole(NUM_LAYERS)) > 10**9
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    assert highest - before < 1 << 18


def test_a_tied_model_has_one_span_only() -> None:
    numbers = numbers_of("llama", tied=True)
    assert numbers.is_tied and numbers.num_values(whole(NUM_LAYERS)) > 0
    for span in (from_sizes((3, 4))[0], whole(NUM_LAYERS + 1)):
        with pytest.raises(SwarmError, match="no span of this model"):
            plan(numbers, span, Working())


def _choose(gib_free: float, batch: int = BATCH, working: Working | None = None) -> Any:
    """What a machine with so much memory takes of a model of 1.1e9 parameters in four shards."""
    config = small_config("llama", hidden_size=4096, intermediate_size=11008)

    def numbers(size: int) -> ModelNumbers:
        return model.measure(config, batch=size, sequence=LENGTH, in_bf16=False)

    shards = split(NUM_LAYERS, 4, memory_plan.piece_values(numbers(1)))
    room = Room(device_bytes=int(gib_free * GIB), host_bytes=1 << 50)
    return choose(numbers, shards, working or Working(device="cuda"), batch, room)


def test_a_peer_takes_the_largest_span_that_fits() -> None:
    sizes = [_choose(gib_free).plan.span.size for gib_free in (2.5, 4, 8)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == NUM_LAYERS
    chosen = _choose(4)
    assert chosen.plan.device_bytes < 4 * GIB and "of 4.00 GiB on the device" in chosen.reason


def test_a_smaller_batch_is_taken_only_where_the_whole_one_fits_nowhere() -> None:
    chosen = _choose(4.0, batch=512)
    assert chosen.batch < 512 and chosen.working.microbatches == -(-512 // chosen.batch)
    assert f"{chosen.batch} of 512 sequences at once" in chosen.reason


def test_where_nothing_fits_it_is_said_what_is_missing() -> None:
    with pytest.raises(
        ResourceError, match=r"the smallest part of this run does not fit.* wants .* of 0\.50 GiB on the device"
    ) as e:
        _choose(0.5)
    assert "more shards" in e.value.advice


def test_on_cpu_and_mps_device_and_host_share_one_memory() -> None:
    planned = plan(numbers_of("llama"), whole(NUM_LAYERS), Working())
    needed = planned.device_bytes + planned.host_bytes
    for shared in ("cpu", "mps"):
        for device_bytes, expected in ((needed, False), (int(needed * 1.1), True)):
            assert fits(planned, Room(device_bytes=device_bytes, host_bytes=device_bytes), shared) is expected
