"""The shards of a model lie one after the other in its flat vector, and a replica of the whole lands one by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from peer.training import model
from peer.training.cut import cut, shards_of
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from peer.training.layout import Layout
from swarm import sharding
from swarm.errors import SpecError, SwarmError
from swarm.families import FAMILIES
from swarm.memory_plan import piece_values
from swarm.run_spec import Inner
from tests.unit.small_models import LENGTH, VOCAB, small_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vector_of_a_model_is_those_of_its_shards_one_after_the_other(family: str, num_shards: int) -> None:
    config = small_config(family)
    whole = model.initial_anchor(config, seed=5)
    shards = cut(config, num_shards)
    assert shards[0].values.start == 0 and shards[-1].values.stop == len(whole)
    for shard in shards:
        assert np.array_equal(model.initial_anchor(config, 5, shard.span), whole[shard.values])
    assert model.build_layout(config).piece(shards[-1].values).layout == model.build_layout(config, shards[-1].span)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_is_that_of_the_memory_plan(family: str) -> None:
    """Which a peer chooses its span by."""
    config = small_config(family)
    numbers = model.measure(config, batch=1, sequence=LENGTH, in_bf16=False)
    for num_shards in (2, 3, 5):
        planned = sharding.split(config.num_hidden_layers, num_shards, piece_values(numbers))
        assert shards_of(config, num_shards) == planned


def test_more_shards_than_layers_are_refused() -> None:
    with pytest.raises(SpecError, match="7 layers cannot be cut into 8 shards"):
        cut(small_config("llama"), 8)


def test_a_piece_that_cuts_a_parameter_is_refused() -> None:
    layout = Layout.of([("a", (4, 2)), ("b", (3,)), ("c", (5,))])
    piece = layout.piece(slice(8, 16))
    assert piece.indices == range(1, 3) and [entry.offset for entry in piece.layout.entries] == [0, 3]
    assert layout.piece(None).layout == layout
    for values in (slice(1, 8), slice(0, 9), slice(8, 15)):
        with pytest.raises(SwarmError, match="not whole parameters"):
            layout.piece(values)


def trained(kind: str, steps: int = 2) -> tuple[Any, np.ndarray, slice, slice]:
    """A replica that moved away from its anchor, which shard lies where, and the anchor."""
    config = small_config("llama")
    built = model.build_model(config, 3)
    inner = Inner(optimizer="adamw")
    layout = model.layout_of(built)
    replica: Any
    replica = Replica(built, layout, inner, CPU) if kind == "fp32" else Int8Replica(built, layout, inner, CPU, 1)
    anchor = model.initial_anchor(config, 4)
    replica.load(anchor)
    step(replica, steps)
    first, second = (shard.values for shard in cut(config, 2))
    return replica, anchor, first, second


def step(replica: Any, steps: int = 1) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH + 1))
    for _ in range(steps):
        assert replica.step(tokens, 1e-2).ok


both_kinds = pytest.mark.parametrize("kind", ["fp32", "int8"])


@both_kinds
def test_the_movement_of_a_shard_is_its_piece_of_the_wholes(kind: str) -> None:
    replica, _, first, second = trained(kind)
    whole = replica.movement()[:]
    assert np.array_equal(np.concatenate([replica.movement(first)[:], replica.movement(second)[:]]), whole)
    assert np.abs(whole[first]).max() > 0 and np.abs(whole[second]).max() > 0


@both_kinds
def test_a_shard_lands_and_the_other_stays_where_it_was_and_keeps_its_movement(kind: str) -> None:
    replica, anchor, first, second = trained(kind)
    snapshot, others = replica.movement(first), replica.movement(second)
    held = others[:].copy()
    step(replica)
    learned = replica.movement(first)[:] - snapshot[:]
    weights, moved = replica.read(), replica.movement(second)[:]
    new_anchor = anchor[first] + np.float32(0.25)
    replica.land(new_anchor, snapshot, first)
    assert np.array_equal(replica.read()[second], weights[second])
    assert np.array_equal(replica.movement(second)[:], moved)
    assert np.array_equal(others[:], held), "a snapshot of the other shard is good until that one lands"
    # In 8 bits what is carried is rounded: within a code of its block.
    tolerance = 1e-6 if kind == "fp32" else 2 * np.abs(learned).max() / 127
    assert np.allclose(replica.movement(first)[:], learned, atol=tolerance)
    if kind == "fp32":
        assert np.allclose(replica.read()[first], new_anchor + learned, atol=1e-6)


@both_kinds
def test_both_shards_land_one_after_the_other_as_the_whole_does(kind: str) -> None:
    """What the two movements say afterwards is what was learned since either snapshot."""
    replica, anchor, first, second = trained(kind)
    for values in (first, second, first, second):
        snapshot = replica.movement(values)
        step(replica)
        learned = replica.movement(values)[:] - snapshot[:]
        replica.land(anchor[values], snapshot, values)
        tolerance = 1e-6 if kind == "fp32" else 2 * np.abs(learned).max() / 127
        assert np.allclose(replica.movement(values)[:], learned, atol=tolerance)


@both_kinds
def test_a_shard_is_reset_with_fresh_moments_and_the_other_is_not(kind: str) -> None:
    replica, anchor, first, second = trained(kind)
    snapshot = replica.movement(first)
    offered, other = snapshot[:].copy(), replica.movement(second)[:]
    replica.reset(anchor[first], first)
    assert np.abs(replica.movement(first)[:]).max() == 0
    assert np.array_equal(replica.movement(second)[:], other) and np.abs(other).max() > 0
    assert np.array_equal(snapshot[:], offered), "what was offered before stays offered" if kind == "int8" else ""
    step(replica)
    assert np.abs(replica.movement(first)[:]).max() > 0
