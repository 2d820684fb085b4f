"""Replicas: weights in and out, inner steps, landing on a new anchor, evaluation, and what a bad step changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peer.training import model as spans
from peer.training.fp32_replica import Replica
from peer.training.layout import Layout
from swarm.errors import DataError, ResourceError, SwarmError
from swarm.run_spec import Inner
from swarm.sharding import whole

VOCAB = 64
CPU = torch.device("cpu")
OPTIMIZERS = ("adamw", "adamw8bit")


def small_model(tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model


def small_replica(optimizer: str = "adamw", tied: bool = False, **inner: Any) -> tuple[Replica, torch.nn.Module]:
    model = small_model(tied)
    layout = Layout.of((name, tuple(p.shape)) for name, p in model.named_parameters())
    return Replica(model, layout, Inner(optimizer=optimizer, **inner), CPU), model  # type: ignore[arg-type]


def batch(seed: int = 0, sequences: int = 4, length: int = 16) -> np.ndarray:
    """Sequences that count upwards: easy to learn."""
    start = np.random.default_rng(seed).integers(0, VOCAB, (sequences, 1))
    return (start + np.arange(length + 1)) % VOCAB


def moments(replica: Replica) -> list[bytes]:
    states = replica._optimizer.state.values()
    return [value.numpy().tobytes() for state in states for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_loaded_are_read_back_bit_for_bit(tied: bool) -> None:
    replica, model = small_replica(tied=tied)
    anchor = np.random.default_rng(1).standard_normal(len(replica.read())).astype(np.float32)
    anchor.flags.writeable = False
    replica.load(anchor)
    assert replica.read().tobytes() == anchor.tobytes()
    first = next(model.parameters())
    assert first.detach().numpy().tobytes() == anchor[: first.numel()].tobytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_inner_steps_learn(optimizer: str) -> None:
    replica, _ = small_replica(optimizer)
    losses = [replica.step(batch(step), 1e-2).loss for step in range(40)]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_steps_from_the_same_weights_give_the_same_replica(optimizer: str) -> None:
    ends = []
    for _ in range(2):
        replica, _ = small_replica(optimizer)
        for step in range(3):
            replica.step(batch(step), 1e-2)
        ends.append(replica.read().tobytes())
    assert ends[0] == ends[1]


def test_a_step_follows_the_learning_rate_that_it_is_given() -> None:
    replica, _ = small_replica()
    before = replica.read()
    assert replica.step(batch(), 0.0).ok
    assert replica.read().tobytes() == before.tobytes()


def test_weight_decay_is_for_matrices_only() -> None:
    replica, model = small_replica(weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in replica._optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.5 if p.ndim == 2 else 0.0 for name, p in model.named_parameters()
    }


def test_gradients_are_clipped_and_the_norm_before_clipping_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    replica, model = small_replica(clip_norm=0.01)
    norms = []

    def step() -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))

    monkeypatch.setattr(replica._optimizer, "step", step)
    result = replica.step(batch(), 1e-2)
    assert result.grad_norm > 0.1
    assert norms == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(optimizer: str) -> None:
    replica, model = small_replica(optimizer)
    replica.step(batch(), 1e-2)
    before, before_moments = replica.read(), moments(replica)
    hook = model.get_parameter("model.norm.weight").register_hook(lambda grad: grad * float("nan"))
    result = replica.step(batch(), 1e-2)
    hook.remove()
    assert not result.ok and np.isnan(result.grad_norm)
    assert replica.read().tobytes() == before.tobytes() and moments(replica) == before_moments
    assert replica.step(batch(), 1e-2).ok


def test_a_reset_takes_the_anchor_and_forgets_the_moments() -> None:
    replica, _ = small_replica()
    anchor = replica.read()
    fresh = replica.step(batch(), 1e-2)
    once = replica.read()
    for step in range(5):
        replica.step(batch(step), 1e-2)
    replica.reset(anchor)
    assert replica.read().tobytes() == anchor.tobytes()
    assert replica.step(batch(), 1e-2) == fresh
    assert replica.read().tobytes() == once.tobytes()


def test_landing_keeps_what_was_learned_since_the_snapshot() -> None:
    replica, _ = small_replica()
    replica.step(batch(), 1e-2)
    snapshot, before = replica.movement(), replica.read()
    replica.step(batch(1), 1e-2)
    moved = replica.movement() - snapshot
    new_anchor = before + np.float32(0.25)
    kept = moments(replica)
    replica.land(new_anchor, snapshot)
    assert replica.read().tobytes() == (moved + new_anchor).tobytes()
    np.testing.assert_allclose(replica.movement(), moved, atol=1e-6)
    assert moments(replica) == kept


def test_landing_without_a_step_since_the_snapshot_gives_the_anchor_itself() -> None:
    replica, _ = small_replica()
    replica.step(batch(), 1e-2)
    new_anchor = np.random.default_rng(2).standard_normal(len(replica.read())).astype(np.float32)
    replica.land(new_anchor, replica.movement())
    assert replica.read().tobytes() == new_anchor.tobytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_evaluation_measures_the_anchor_and_leaves_no_trace(optimizer: str) -> None:
    replica, model = small_replica(optimizer)
    anchor = replica.read()
    expected = replica.step(batch(), 1e-2).loss
    before, before_moments, kept_anchor = replica.read(), moments(replica), anchor.copy()
    assert replica.evaluate(anchor, [batch(), batch()]) == pytest.approx(expected, rel=1e-6)
    assert replica.read().tobytes() == before.tobytes() and moments(replica) == before_moments
    assert anchor.tobytes() == kept_anchor.tobytes() and model.training
    untouched, _ = small_replica(optimizer)
    untouched.step(batch(), 1e-2)
    assert replica.step(batch(1), 1e-2) == untouched.step(batch(1), 1e-2)
    assert replica.read().tobytes() == untouched.read().tobytes()


def test_evaluation_weighs_batches_by_their_tokens() -> None:
    replica, _ = small_replica()
    anchor, small, large = replica.read(), batch(1, sequences=1), batch(2, sequences=3)
    mean = (replica.evaluate(anchor, [small]) + 3 * replica.evaluate(anchor, [large])) / 4
    assert replica.evaluate(anchor, [small, large]) == pytest.approx(mean, rel=1e-6)


def test_a_failed_evaluation_puts_the_weights_back() -> None:
    replica, _ = small_replica()
    before = replica.read()
    with pytest.raises(DataError):
        replica.evaluate(np.zeros_like(before), [np.full((1, 3), VOCAB)])
    with pytest.raises(DataError, match="no validation"):
        replica.evaluate(np.zeros_like(before), [])
    assert replica.read().tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("a token beyond the vocabulary", np.full((1, 4), VOCAB)),
        ("a negative token", np.full((1, 4), -1)),
        ("no sequences", np.zeros((0, 4), np.int64)),
        ("no targets", np.zeros((2, 1), np.int64)),
        ("one dimension", np.zeros(4, np.int64)),
        ("another type", np.zeros((1, 4), np.float32)),
    ],
)
def test_batches_that_cannot_be_read_are_refused(name: str, tokens: np.ndarray) -> None:
    replica, _ = small_replica()
    with pytest.raises(DataError, match="a batch"):
        replica.step(tokens, 1e-2)


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros(0, np.float32)])
def test_weights_of_another_length_or_type_are_refused(wrong: np.ndarray) -> None:
    replica, _ = small_replica()
    good = replica.read()
    for attempt in (
        lambda: replica.load(wrong),
        lambda: replica.land(good, wrong),
        lambda: replica.load(good.astype(np.float64)),  # type: ignore[arg-type]
    ):
        with pytest.raises(SwarmError):
            attempt()
    assert replica.read().tobytes() == good.tobytes()


def test_a_layout_of_another_model_is_refused() -> None:
    with pytest.raises(SwarmError, match="layout"):
        Replica(small_model(), Layout.of([("a", (2,))]), Inner(), CPU)


def scarce_memory(model: torch.nn.Module, largest_batch: int) -> list[int]:
    """Make ``model`` run out of memory beyond ``largest_batch`` sequences; gives the batches that it was asked for."""
    asked: list[int] = []

    def refuse(_: Any, __: Any, kwargs: Any) -> None:
        asked.append(len(kwargs["input_ids"]))
        if asked[-1] > largest_batch:
            raise torch.OutOfMemoryError("simulated")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return asked


def test_when_memory_runs_out_a_step_is_made_in_two_halves_with_the_same_gradient() -> None:
    whole, _ = small_replica()
    halved, model = small_replica()
    asked = scarce_memory(model, largest_batch=3)
    expected, result = whole.step(batch(sequences=5), 1e-2), halved.step(batch(sequences=5), 1e-2)
    assert asked == [5, 3, 2]
    assert (result.loss, result.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-5)
    halved.step(batch(sequences=5), 1e-2)
    assert asked == [5, 3, 2, 3, 2]


def test_a_batch_is_halved_until_one_sequence_and_then_the_person_is_told() -> None:
    replica, model = small_replica()
    asked = scarce_memory(model, largest_batch=1)
    assert replica.step(batch(sequences=4), 1e-2).num_microbatches == 4
    assert asked == [4, 2, 1, 1, 1, 1]
    replica, model = small_replica()
    before = replica.read()
    asked = scarce_memory(model, largest_batch=0)
    with pytest.raises(ResourceError, match="one sequence at a time") as caught:
        replica.step(batch(sequences=4), 1e-2)
    assert asked == [4, 2, 1] and caught.value.advice
    assert replica.read().tobytes() == before.tobytes()


def test_a_model_without_memory_takes_its_weights_from_the_anchor_alone() -> None:
    full, _ = small_replica(tied=True)
    config: Any = small_model(tied=True).config
    empty = spans.build_span(config, whole(1))
    replica = Replica(empty, spans.layout_of(empty), Inner(optimizer="adamw"), CPU, 3)
    replica.load(full.read())
    assert replica.read().tobytes() == full.read().tobytes()
    expected, result = full.step(batch(), 1e-2), replica.step(batch(), 1e-2)
    assert (result.loss, result.num_microbatches) == (pytest.approx(expected.loss, rel=1e-6), 2)


def test_bitsandbytes_is_imported_without_code_from_a_hub() -> None:
    import subprocess
    import sys

    program = (
        "import sys, types; fake = types.ModuleType('kernels'); sys.modules['kernels'] = fake\n"
        "fake.get_kernel = lambda *a, **k: sys.exit('fetched code')\n"
        "from peer.training import inner_optimizer; inner_optimizer._bitsandbytes()\n"
        "assert sys.modules['kernels'] is fake\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
