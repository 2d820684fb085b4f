"""8-bit replicas: the model they compute, inner steps, what a bad step changes, movement and landing, randomness."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from peer.training import int8_matrix, int8_modules, model
from peer.training.fp32_replica import Replica
from peer.training.int8_matrix import Int8Matrix
from peer.training.int8_replica import Int8Replica
from peer.training.layout import Layout
from swarm.errors import DataError, ResourceError, SwarmError
from swarm.families import FAMILIES
from swarm.run_spec import Inner

VOCAB = 96
CPU = torch.device("cpu")
SIZES = {
    "gpt_neo": dict(
        hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2, window_size=4
    ),
    "gptj": dict(n_embd=64, n_layer=2, n_head=2, rotary_dim=8),
    "gpt_neox": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=2),
    "llama": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
    ),
    "mistral": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        sliding_window=4,
    ),
}  # fmt: skip


def build(family: str = "llama", tied: bool = False, **values: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    kind = CONFIG_MAPPING[family]
    config = kind(vocab_size=VOCAB, tie_word_embeddings=tied, **{**SIZES[family], **values})
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    built: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Families start biases at zero and norms at one: nothing that a test could miss.
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return built


def replica_of(built: torch.nn.Module, seed: int = 0, **inner: Any) -> Int8Replica:
    return Int8Replica(built, model.layout_of(built), Inner(**inner), CPU, seed)


def small(tied: bool = False, seed: int = 0, **inner: Any) -> Int8Replica:
    return replica_of(build("llama", tied), seed, **inner)


def batch(seed: int = 0, sequences: int = 4, length: int = 16) -> np.ndarray:
    start = np.random.default_rng(seed).integers(0, VOCAB, (sequences, 1))
    return (start + np.arange(length + 1)) % VOCAB


def state(replica: Int8Replica) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in replica.persistent_tensors()]


def dequantised_model(replica: Int8Replica, family: str, tied: bool = False) -> torch.nn.Module:
    """An ordinary model with exactly the weights that the replica's codes stand for."""
    ordinary = build(family, tied)
    Replica(ordinary, model.layout_of(ordinary), Inner(optimizer="adamw"), CPU).load(replica.read())
    return ordinary


def logits(built: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return built(input_ids=torch.from_numpy(tokens), use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_equals_the_dequantised_models_bit_for_bit(family: str, tied: bool) -> None:
    built = build(family, tied)
    replica = replica_of(built)
    ordinary = dequantised_model(replica, family, tied)
    assert torch.equal(logits(built, batch()), logits(ordinary, batch()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_dequantised_model(
    family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(family, tied)
    replica = replica_of(built, clip_norm=1e9)
    names = {id(m): e.name for m, e in zip(replica._members, replica._layout.entries, strict=True)}
    ordinary = dequantised_model(replica, family, tied)
    tokens = torch.from_numpy(batch())
    expected = torch.nn.functional.cross_entropy(
        ordinary(input_ids=tokens[:, :-1], use_cache=False).logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    expected.backward()
    seen: dict[str, torch.Tensor] = {}

    def note(self: Int8Matrix, norm: float, gradient_of: Any) -> None:
        seen[names[id(self)]] = gradient_of(0, self.rows).clone()

    def note_vectors(step: Any) -> float:
        seen.update({names[id(vector)]: vector.grad.clone() for vector in replica._vectors})
        return 0.0

    monkeypatch.setattr(Int8Matrix, "_update", note)
    monkeypatch.setattr(replica, "_update_vectors", note_vectors)
    result = replica.step(batch(), 1e-3)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert seen.keys() == {name for name, _ in ordinary.named_parameters()}
    for name, parameter in ordinary.named_parameters():
        # Only the head's gradient is kept in bf16: its parts come token chunk by token chunk.
        is_head = parameter is ordinary.get_output_embeddings().weight
        exact = parameter.grad.reshape(seen[name].shape)
        difference = (seen[name] - exact).norm() / exact.norm()
        assert difference < (4e-3 if is_head else 1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_steps_learn_in_every_family(family: str) -> None:
    replica = replica_of(build(family))
    losses = [replica.step(batch(step), 1e-2).loss for step in range(25)]
    assert losses[-1] < losses[0] * 0.6


def test_tiles_change_neither_loss_nor_gradients_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small(tied=True).step(batch(), 1e-2)
    monkeypatch.setattr(int8_matrix, "WHOLE_VALUES", 1024)
    monkeypatch.setattr(int8_matrix, "TILE_VALUES", 1024)
    monkeypatch.setattr(int8_modules, "LOGIT_VALUES", {"cpu": 7 * VOCAB})
    tiled = small(tied=True).step(batch(), 1e-2)
    assert (tiled.loss, tiled.grad_norm) == pytest.approx((whole.loss, whole.grad_norm), rel=2e-3)


def test_logits_never_exist_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = int8_modules._logits

    def watch(head: Any, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return real(head, hidden)

    monkeypatch.setattr(int8_modules, "LOGIT_VALUES", {"cpu": 10 * VOCAB})
    monkeypatch.setattr(int8_modules, "_logits", watch)
    small().step(batch(), 1e-2)
    assert sizes == [10] * 6 + [4]


def test_the_same_seed_gives_the_same_replica_and_another_seed_does_not() -> None:
    ends = []
    for seed in (1, 1, 2):
        replica = small(seed=seed)
        for step in range(3):
            replica.step(batch(step), 1e-2)
        snapshot = replica.movement()
        replica.step(batch(3), 1e-2)
        replica.land(replica.read() + np.float32(0.01), snapshot)
        ends.append(state(replica))
    assert ends[0] == ends[1] != ends[2]


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    ends = []
    for checkpoint in (False, True):
        replica = small(checkpoint_activations=checkpoint)
        ends.append(([replica.step(batch(step), 1e-2).loss for step in range(3)], state(replica)))
    assert ends[0] == ends[1]


def test_persistent_bytes_of_a_matrix_are_three_and_a_little() -> None:
    matrix = Int8Matrix((512, 256), Inner(), CPU)
    assert sum(t.numel() * t.element_size() for t in matrix.tensors()) / matrix.num_values == 3 + 3 * 4 / 256


def test_a_matrix_is_updated_as_soon_as_its_last_gradient_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = small(tied=True)
    held: list[int] = []
    real = Int8Matrix._update

    def watch(self: Int8Matrix, norm: float, gradient_of: Any) -> None:
        held.append(sum(matrix._gradient is not None for matrix in replica._matrices))
        real(self, norm, gradient_of)

    monkeypatch.setattr(Int8Matrix, "_update", watch)
    replica.step(batch(), 1e-2)
    # While the layers are updated, the tied matrix alone waits: its last gradient comes from the embedding.
    assert held == [1] * (len(replica._matrices) - 1) + [0]


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    replica = small()
    replica.step(batch(), 1e-2)
    before = state(replica)
    with torch.no_grad():
        replica._vectors[0].fill_(math.nan)
    result = replica.step(batch(), 1e-2)
    assert not result.ok and math.isnan(result.loss) and math.isnan(result.grad_norm)
    replica._vectors[0].data.copy_(torch.from_numpy(np.frombuffer(before[state_index(replica, 0)], np.float32).copy()))
    assert state(replica) == before
    assert replica.step(batch(), 1e-2).ok


def state_index(replica: Int8Replica, vector: int) -> int:
    return next(i for i, tensor in enumerate(replica.persistent_tensors()) if tensor is replica._vectors[vector])


def test_a_gradient_that_is_not_finite_skips_its_matrix_and_marks_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = small()
    bad = replica._matrices[2]
    real = Int8Matrix.add

    def spoil(self: Int8Matrix, gradient: torch.Tensor) -> None:
        real(self, gradient * math.nan if self is bad else gradient)

    def bytes_of(matrix: Int8Matrix) -> list[bytes]:
        return [tensor.numpy().tobytes() for tensor in matrix.tensors()]

    before = [bytes_of(matrix) for matrix in replica._matrices]
    monkeypatch.setattr(Int8Matrix, "add", spoil)
    result = replica.step(batch(), 1e-2)
    changed = [bytes_of(matrix) != was for matrix, was in zip(replica._matrices, before, strict=True)]
    assert not result.ok and math.isfinite(result.loss)
    assert changed == [matrix is not bad for matrix in replica._matrices]
    monkeypatch.undo()
    assert replica.step(batch(), 1e-2).ok


@pytest.mark.parametrize("microbatch_sequences", [None, 1])
def test_no_matrix_is_left_with_more_than_clip_norm(
    monkeypatch: pytest.MonkeyPatch, microbatch_sequences: int | None
) -> None:
    """In any step, whole or in several microbatches; and the whole stays near it once its proportions are known."""
    built = build("llama")
    rules = Inner(clip_norm=0.01)
    replica = Int8Replica(built, model.layout_of(built), rules, CPU, 0, microbatch_sequences)
    clipped: list[float] = []
    real = int8_matrix.Moments.update_

    def watch(self: Any, weights: torch.Tensor, gradient: torch.Tensor, first: int, update: Any) -> None:
        clipped.append(float(gradient.norm()) * update.gradient_scale)
        real(self, weights, gradient, first, update)

    monkeypatch.setattr(int8_matrix.Moments, "update_", watch)
    for number in range(20):
        clipped.clear()
        result = replica.step(batch(number), 1e-3)
        assert result.grad_norm > 0.1 and result.num_microbatches == (1 if microbatch_sequences is None else 4)
        assert len(clipped) == len(replica._matrices)
        assert max(clipped) <= 0.01 * (1 + 1e-5)
        assert 0.005 < math.sqrt(sum(norm**2 for norm in clipped)) < 0.02


def test_a_learning_rate_of_zero_moves_no_matrix() -> None:
    replica = small()
    before = replica.read()
    assert replica.step(batch(), 0.0).ok
    assert np.abs(replica.read() - before).max() < 1e-5


def test_loading_keeps_weights_within_a_step_of_the_anchor_and_vectors_exactly() -> None:
    replica = small()
    anchor = np.random.default_rng(1).standard_normal(len(replica.read())).astype(np.float32)
    anchor.flags.writeable = False
    replica.load(anchor)
    off = np.abs(replica.read() - anchor)
    assert 0 < off.max() < 5 / 127
    for entry, member in zip(replica._layout.entries, replica._members, strict=True):
        if not isinstance(member, Int8Matrix):
            assert not off[entry.offset : entry.offset + entry.size].any()
    assert not replica.movement()[:].any()


def test_movement_is_what_steps_did_and_not_what_quantising_the_anchor_did() -> None:
    replica = small()
    anchor = replica.read() + np.random.default_rng(1).standard_normal(len(replica.read())).astype(np.float32) * 1e-4
    replica.load(anchor)
    start = replica.read()
    assert (start != anchor).any()
    replica.step(batch(), 1e-2)
    movement, kept = replica.movement(), replica.movement()[:]
    assert (movement[:] == replica.read() - start).all()
    assert (movement[100:5000] == kept[100:5000]).all() and len(movement) == len(anchor)
    replica.step(batch(1), 1e-2)
    assert (movement[:] == kept).all()


def test_landing_carries_the_movement_since_the_snapshot_and_nothing_else() -> None:
    replica = small()
    replica.step(batch(), 1e-2)
    snapshot = replica.movement()
    replica.step(batch(1), 1e-2)
    since = replica.movement()[:] - snapshot[:]
    new_anchor = np.random.default_rng(2).standard_normal(len(since)).astype(np.float32)
    replica.land(new_anchor, snapshot)
    carried = replica.movement()[:]
    largest = np.abs(since).max()
    assert np.abs(carried - since).max() <= largest / 127 * 1.01
    assert abs((carried - since).mean()) < largest / 127 / 50  # rounded both ways
    assert np.abs(replica.read() - (new_anchor + carried)).max() < 5 / 127
    # From here on, movement is what was carried and what steps do: the error of quantising is in neither.
    start = replica.read()
    replica.step(batch(2), 1e-2)
    np.testing.assert_allclose(replica.movement()[:], replica.read() - start + carried, atol=1e-7)


def test_landing_without_a_step_since_the_snapshot_carries_nothing() -> None:
    replica = small()
    replica.step(batch(), 1e-2)
    replica.land(replica.read(), replica.movement())
    assert not replica.movement()[:].any()


def test_a_reset_takes_the_anchor_and_forgets_the_moments() -> None:
    replica = small()
    anchor = replica.read()
    for step in range(3):
        replica.step(batch(step), 1e-2)
    replica.reset(anchor)
    assert all(not tensor.any() for matrix in replica._matrices for tensor in matrix.moments.tensors())
    assert all(matrix.moments.step == 0 for matrix in replica._matrices)
    assert not replica.movement()[:].any()


def test_evaluation_measures_the_exact_anchor_and_leaves_no_trace() -> None:
    replica, ordinary = small(), build("llama")
    exact = Replica(ordinary, model.layout_of(ordinary), Inner(optimizer="adamw"), CPU)
    anchor = np.random.default_rng(1).standard_normal(len(replica.read())).astype(np.float32) * 0.1
    replica.step(batch(), 1e-2)
    before, kept = state(replica), anchor.copy()
    batches = [batch(1), batch(2, sequences=3)]
    assert replica.evaluate(anchor, batches) == pytest.approx(exact.evaluate(anchor, batches), rel=1e-6)
    assert state(replica) == before and anchor.tobytes() == kept.tobytes()
    with pytest.raises(DataError, match="no validation"):
        replica.evaluate(anchor, [])
    with pytest.raises(DataError, match="a batch"):
        replica.evaluate(anchor, [np.full((1, 3), VOCAB)])
    assert state(replica) == before


def scarce_memory(replica: Int8Replica, largest_batch: int) -> list[int]:
    """Make the model run out of memory beyond ``largest_batch`` sequences; gives the batches that it was asked for."""
    asked: list[int] = []

    def refuse(_: Any, __: Any, kwargs: Any) -> None:
        asked.append(len(kwargs["input_ids"]))
        if asked[-1] > largest_batch:
            raise torch.OutOfMemoryError("simulated")

    replica._model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    return asked


def test_when_memory_runs_out_two_halves_add_up_and_the_step_says_so() -> None:
    whole, halved = small(), small()
    asked = scarce_memory(halved, largest_batch=3)
    expected, result = whole.step(batch(sequences=5), 1e-2), halved.step(batch(sequences=5), 1e-2)
    assert asked == [5, 3, 2]
    assert (expected.num_microbatches, result.num_microbatches) == (1, 2)
    assert (result.loss, result.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=2e-3)
    halved.step(batch(sequences=5), 1e-2)
    assert asked == [5, 3, 2, 3, 2]


def test_a_matrix_that_was_updated_before_memory_ran_out_is_not_updated_again() -> None:
    replica = small()
    fail = [True]

    def refuse_once(gradient: torch.Tensor) -> torch.Tensor:
        if fail.pop() if fail else False:
            raise torch.OutOfMemoryError("simulated")
        return gradient

    embedding = replica._model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, output: output.register_hook(refuse_once) and None)
    result = replica.step(batch(), 1e-2)
    assert result.ok and result.num_microbatches == 2
    assert [matrix.moments.step for matrix in replica._matrices] == [1] * len(replica._matrices)


def test_a_batch_is_halved_again_and_again_and_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    whole, halved = small(), small()
    asked = scarce_memory(halved, largest_batch=1)
    expected, result = whole.step(batch(sequences=5), 1e-2), halved.step(batch(sequences=5), 1e-2)
    assert asked == [5, 3, 2, *[1] * 5] and result.num_microbatches == 5 and result.ok
    assert (result.loss, result.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=2e-3)
    halved.step(batch(sequences=5), 1e-2)
    assert asked[8:] == [1] * 5
    assert [record.getMessage()[-27:] for record in caplog.records][-1] == "on 1 of 5 sequences at once"


def test_where_one_sequence_does_not_fit_the_person_is_told() -> None:
    replica = small()
    before = state(replica)
    asked = scarce_memory(replica, largest_batch=0)
    with pytest.raises(ResourceError, match="one sequence at a time") as caught:
        replica.step(batch(sequences=8), 1e-2)
    assert asked == [8, 4, 2, 1] and caught.value.advice
    assert state(replica) == before


def test_no_more_sequences_at_once_than_the_memory_plan_says() -> None:
    built = build()
    replica = Int8Replica(built, model.layout_of(built), Inner(), CPU, 0, 2)
    anchor, asked = replica.read(), scarce_memory(replica, largest_batch=2)
    loss = replica.evaluate(anchor, [batch(sequences=5)])
    result = replica.step(batch(sequences=5), 1e-2)
    assert asked == [2, 2, 1] * 2 and result.num_microbatches == 3
    assert loss == pytest.approx(small().evaluate(anchor, [batch(sequences=5)]), rel=1e-6)


def test_vectors_of_another_length_or_type_are_refused_and_nothing_changes() -> None:
    replica = small()
    good, before, snapshot = replica.read(), state(replica), replica.movement()
    for attempt in (
        lambda: replica.load(np.zeros(3, np.float32)),
        lambda: replica.land(np.zeros(3, np.float32), snapshot),
        lambda: replica.land(good, np.zeros(3, np.float32)),
        lambda: replica.load(good.astype(np.float64)),  # type: ignore[arg-type]
    ):
        with pytest.raises(SwarmError):
            attempt()
    assert state(replica) == before


def test_weights_that_are_not_finite_are_refused() -> None:
    replica = small()
    with pytest.raises(SwarmError, match="not finite"):
        replica.load(np.full(len(replica.read()), np.nan, np.float32))


def test_models_that_do_not_fit_the_replica_are_refused() -> None:
    with pytest.raises(SwarmError, match="layout"):
        Int8Replica(build(), Layout.of([("a", (2,))]), Inner(), CPU)
    built = build()
    built.register_parameter("strange", torch.nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(SwarmError, match="no 8-bit module holds strange"):
        replica_of(built)


def test_32_bit_moments_serve_where_a_spec_or_a_device_wants_them() -> None:
    replica = small(optimizer="adamw")
    losses = [replica.step(batch(step), 1e-2).loss for step in range(25)]
    assert losses[-1] < losses[0] / 2


def test_8_bit_moments_follow_32_bit_ones() -> None:
    torch.manual_seed(0)
    ends = []
    for optimizer in ("adamw", "adamw8bit"):
        moments = int8_matrix.Moments(1024, Inner(optimizer=optimizer), CPU)  # type: ignore[arg-type]
        weights = torch.ones(1024)
        for step in range(1, 6):
            gradient = torch.randn(1024, generator=torch.Generator().manual_seed(step))
            update = int8_matrix.Update(
                inner=Inner(),
                learning_rate=1e-2,
                step=step,
                gradient_scale=0.5,
            )
            moments.update_(weights, gradient, 0, update)
        ends.append(weights)
    moved = (ends[0] - 1).norm()
    assert (ends[1] - ends[0]).norm() / moved < 0.05


def test_a_model_without_memory_takes_its_weights_from_the_anchor_alone() -> None:
    full = small()
    anchor = full.read()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(build().config, dtype=torch.float32)
    # What is no parameter (angles of positions) has values; parameters have none.
    empty.model.rotary_emb = build().model.rotary_emb
    replica = replica_of(empty, seed=5)
    replica.load(anchor)
    assert np.abs(replica.read() - anchor).max() < 1e-6 + np.abs(anchor).max() / 127
    assert replica.step(batch(), 1e-2).ok
