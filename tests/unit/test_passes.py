"""A microbatch in two halves: others may pass meanwhile, repeated ones teach nothing, and spans learn as the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peer.training import int8_modules, model
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from peer.training.microbatches import Microbatch
from peer.training.passes import SpanReplica
from peer.training.span import from_layer
from swarm.errors import DataError, SwarmError
from swarm.families import FAMILIES, family_of
from swarm.run_spec import Inner
from swarm.sharding import from_sizes, whole
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_config

CPU = torch.device("cpu")
RATE = 1e-2
# Clipping goes by the norm of a span, not of the whole: switched off where spans are compared with the whole.
NO_CLIPPING: dict[str, Any] = {"weights": "fp32", "optimizer": "adamw", "clip_norm": 1e9}
BATCHES = [np.random.default_rng(seed).integers(0, VOCAB, (2, LENGTH + 1)) for seed in range(4)]

Make = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fp32_spans(family: str, sizes: tuple[int, ...], **inner: Any) -> list[Replica]:
    config, rules = small_config(family), Inner(**{**NO_CLIPPING, **inner})
    pieces = [model.build_span(config, span) for span in from_sizes(sizes)]
    replicas = [Replica(piece, model.layout_of(piece), rules, CPU) for piece in pieces]
    for replica, span in zip(replicas, from_sizes(sizes), strict=True):
        replica.load(model.initial_anchor(config, 3, span))
    return replicas


def int8_spans(family: str, sizes: tuple[int, ...], **inner: Any) -> list[Int8Replica]:
    config = small_config(family)
    pieces = [model.build_span(config, span) for span in from_sizes(sizes)]
    replicas = [
        Int8Replica(piece, model.layout_of(piece), Inner(**inner), CPU, seed=number)
        for number, piece in enumerate(pieces)
    ]
    for replica, span in zip(replicas, from_sizes(sizes), strict=True):
        replica.load(model.initial_anchor(config, 3, span))
    return replicas


both = pytest.mark.parametrize("make", [fp32_spans, int8_spans], ids=["fp32", "int8"])


def microbatch(tokens: np.ndarray, hidden: torch.Tensor | None = None) -> Microbatch:
    return Microbatch(tokens=tokens, weight=1 / tokens[:, 1:].size, hidden_BLH=hidden)


def there_and_back(replicas: list[Any], batches: list[np.ndarray], *, counts: bool = True) -> list[float]:
    """All of ``batches`` go forward through every span before the first goes back. Losses per token."""
    passed: list[list[Any]] = []
    for tokens in batches:
        hidden, row = None, []
        for replica in replicas:
            row.append(replica.forward(microbatch(tokens, hidden)))
            hidden = row[-1].result_BLH
        passed.append(row)
    losses = []
    for tokens, row in zip(batches, passed, strict=True):
        gradient = None
        for replica, half in zip(reversed(replicas), reversed(row), strict=True):
            trained = replica.backward(half, gradient, counts=counts)
            if replica is replicas[-1]:
                losses.append(trained.loss / tokens[:, 1:].size)
            gradient = trained.gradient_BLH
        assert gradient is None
    return losses


def step(replicas: list[Any], batches: list[np.ndarray]) -> list[float]:
    for replica in replicas:
        replica.begin_step(RATE)
    losses = there_and_back(replicas, batches)
    for replica in replicas:
        assert replica.finish_step(len(batches)).ok
    return losses


@pytest.mark.parametrize("sizes", [(3, 4), (1, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_spans_learn_what_the_whole_model_learns(family: str, sizes: tuple[int, ...]) -> None:
    """Two microbatches in flight at once, as one batch of the whole: losses agree to 1e-5 over the steps."""
    [whole] = fp32_spans(family, (NUM_LAYERS,))
    replicas = fp32_spans(family, sizes)
    for number in range(6):
        pair = [BATCHES[number % 4], BATCHES[(number + 1) % 4]]
        wanted = whole.step(np.concatenate(pair), RATE).loss
        assert np.mean(step(replicas, pair)) == pytest.approx(wanted, rel=1e-5)


def test_an_open_ended_step_of_an_8_bit_replica_is_nearly_that_of_a_known_number() -> None:
    """Gradients wait in bf16 either way; only when matrices learn differs."""
    [open_ended], [known] = int8_spans("llama", (NUM_LAYERS,)), int8_spans("llama", (NUM_LAYERS,))
    step([open_ended], BATCHES[:2])
    with known.inner_step(RATE, 2):
        for tokens in BATCHES[:2]:
            known.train_microbatch(Microbatch(tokens=tokens, weight=0.5 / tokens[:, 1:].size))
    moved = [replica.movement()[:] for replica in (open_ended, known)]
    assert np.corrcoef(moved[0], moved[1])[0, 1] > 0.9


@both
def test_spans_learn_from_microbatches_that_overlap(make: Make) -> None:
    replicas = make("llama", (2, 3, 2), clip_norm=1.0)
    tokens = np.arange(2 * (LENGTH + 1)).reshape(2, -1) % VOCAB
    losses = [step(replicas, [tokens, tokens])[0] for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]


@both
def test_a_repeated_microbatch_is_answered_alike_and_teaches_nothing(make: Make) -> None:
    """Between two that count, in the middle of a step: weights end as if it had not been."""
    ended, losses = [], []
    for repeats in (0, 2):
        replicas = make("gptj", (3, 4))
        for replica in replicas:
            replica.begin_step(RATE)
        came = there_and_back(replicas, BATCHES[:1])
        for _ in range(repeats):
            assert there_and_back(replicas, BATCHES[:1], counts=False) == came
        came += there_and_back(replicas, BATCHES[1:2])
        for replica in replicas:
            replica.finish_step(2)
        losses.append(came)
        ended.append([replica.read().tobytes() for replica in replicas])
    assert losses[0] == losses[1] and ended[0] == ended[1]


@both
def test_a_dropped_step_changes_nothing(make: Make) -> None:
    replicas = make("bloom", (3, 4))
    before = [replica.read().tobytes() for replica in replicas]
    for replica in replicas:
        replica.begin_step(RATE)
    there_and_back(replicas, BATCHES[:2])
    for replica in replicas:
        replica.drop_step()
    assert [replica.read().tobytes() for replica in replicas] == before
    step(replicas, BATCHES[:1])
    assert [replica.read().tobytes() for replica in replicas] != before


@both
def test_a_step_that_nothing_counted_towards_is_refused(make: Make) -> None:
    [replica] = make("llama", (NUM_LAYERS,))
    replica.begin_step(RATE)
    with pytest.raises(SwarmError, match="nothing counted"):
        replica.finish_step(0)


@both
def test_a_gradient_of_another_size_is_refused(make: Make) -> None:
    replica: SpanReplica = make("llama", (3, 4))[0]
    replica.begin_step(RATE)
    passed = replica.forward(microbatch(BATCHES[0]))
    with pytest.raises(DataError, match="a gradient of"):
        replica.backward(passed, torch.zeros(1, LENGTH, 16))


def test_a_step_of_one_microbatch_leaves_no_gradient_waiting() -> None:
    """The whole model's path: every matrix is updated within the backward pass."""
    [replica] = int8_spans("llama", (NUM_LAYERS,))
    before = replica.read()
    replica.begin_step(RATE, 1)
    there_and_back([replica], BATCHES[:1])
    assert all(matrix._gradient is None for matrix in replica._matrices)
    assert replica.finish_step(1).ok
    assert not np.array_equal(before, replica.read())


@both
def test_a_loss_that_is_not_finite_leaves_nothing_behind(make: Make) -> None:
    """Hidden states of which the head makes no loss, then good ones: weights end as if they had not been."""
    ended = []
    for has_bad in (False, True):
        first, last = make("gpt_neox", (3, 4))
        good = first.forward(microbatch(BATCHES[0])).result_BLH
        last.begin_step(RATE)
        if has_bad:
            bad = good.clone()
            bad[0, 0] = 3e38
            trained = last.backward(last.forward(microbatch(BATCHES[0], bad)), None)
            assert np.isnan(trained.loss) and not trained.is_spoiled
        last.backward(last.forward(microbatch(BATCHES[0], good)), None)
        assert last.finish_step(1).ok
        ended.append(last.read().tobytes())
    assert ended[0] == ended[1]


def test_a_loss_that_is_not_finite_after_gradients_of_the_head_spoils_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of one token at a time: those of the first token are taken in before the last is seen."""
    monkeypatch.setitem(int8_modules.LOGIT_VALUES, "cpu", 1)
    first, last = int8_spans("gpt_neox", (3, 4))
    bad = first.forward(microbatch(BATCHES[0])).result_BLH.clone()
    bad[-1, -1] = 3e38
    last.begin_step(RATE)
    trained = last.backward(last.forward(microbatch(BATCHES[0], bad)), None)
    assert np.isnan(trained.loss) and trained.is_spoiled


def with_entrance(family: str, first: int, kind: type[Any], **inner: Any) -> Any:
    """A whole model that may be entered at layer ``first`` too, where its second shard begins."""
    config = small_config(family)
    built = model.build_span(config, whole(NUM_LAYERS))
    replica = kind(built, model.layout_of(built), Inner(**inner), CPU)
    replica.load(np.concatenate([model.initial_anchor(config, 3, span) for span in from_sizes((3, 4))]))
    replica.passes.open_entrance(1, from_layer(built, family_of(family), first))
    return replica


@pytest.mark.parametrize("family", FAMILIES)
def test_who_enters_a_whole_model_at_its_second_shard_meets_the_span_that_begins_there(family: str) -> None:
    """Loss, gradient, and a step in which one microbatch passed all and another the second shard only."""
    first, last = fp32_spans(family, (3, 4))
    entered = with_entrance(family, 3, Replica, **NO_CLIPPING)
    size = len(first.read())
    for replica in (first, last, entered):
        replica.begin_step(RATE)
    own, others = (Microbatch(tokens=tokens, weight=1 / tokens[:, 1:].size) for tokens in BATCHES[:2])

    there = first.forward(own)
    came = last.backward(last.forward(replace(own, hidden_BLH=there.result_BLH)), None)
    first.backward(there, came.gradient_BLH)
    entered.backward(entered.forward(own), None)

    hidden_BLH = fp32_spans(family, (3, 4))[0].forward(others).result_BLH
    wanted = last.backward(last.forward(replace(others, hidden_BLH=hidden_BLH)), None)
    got = entered.backward(entered.forward(replace(others, hidden_BLH=hidden_BLH, entrance=1)), None)
    assert got.loss == pytest.approx(wanted.loss, rel=1e-6)
    torch.testing.assert_close(got.gradient_BLH, wanted.gradient_BLH)

    assert first.finish_step(1).ok and last.finish_step(2).ok
    assert entered.finish_step(1, [(slice(size, len(entered.read())), 1)]).ok
    np.testing.assert_allclose(entered.read(), np.concatenate([first.read(), last.read()]), atol=2e-6)


def test_who_enters_an_8_bit_model_later_leaves_what_comes_before_as_it_is() -> None:
    entered = with_entrance("llama", 3, Int8Replica)
    before, size = entered.read(), len(fp32_spans("llama", (3, 4))[0].read())
    hidden_BLH = fp32_spans("llama", (3, 4))[0].forward(Microbatch(tokens=BATCHES[0], weight=0.01)).result_BLH
    entered.begin_step(RATE)
    given = Microbatch(tokens=BATCHES[0], weight=0.01, hidden_BLH=hidden_BLH, entrance=1)
    assert entered.backward(entered.forward(given), None).gradient_BLH is not None
    assert entered.finish_step(0, [(slice(size, len(before)), 1)]).ok
    changed = entered.read() != before
    assert not changed[:size].any() and changed[size:].mean() > 0.2
