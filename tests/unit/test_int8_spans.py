"""8-bit spans, for every family: together they compute what the dequantised whole computes, and learn as it does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peer.training import int8_matrix, model
from peer.training.int8_matrix import Int8Matrix
from peer.training.int8_replica import Int8Replica
from peer.training.microbatches import Microbatch, Trained
from peer.training.span import forward
from swarm.errors import DataError, SwarmError
from swarm.families import FAMILIES
from swarm.run_spec import Inner
from swarm.sharding import Span, from_sizes
from tests.unit.small_models import LENGTH, VOCAB, small_config

CPU = torch.device("cpu")
CUTS = [(2, 5), (4, 1, 2), (1, 3, 2, 1)]  # layers per shard: uneven
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH + 1))
WEIGHT = 1 / TOKENS[:, 1:].size

every_family = pytest.mark.parametrize("family", FAMILIES)
every_cut = pytest.mark.parametrize("sizes", CUTS, ids=str)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are not worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pipeline:
    """One 8-bit replica for each shard, and the whole ordinary model with the weights that they stand for."""

    def __init__(self, family: str, sizes: tuple[int, ...], **inner: Any) -> None:
        config = small_config(family)
        self.spans = from_sizes(sizes)
        self.pieces = [model.build_span(config, span) for span in self.spans]
        self.replicas = [
            Int8Replica(piece, model.layout_of(piece), Inner(**inner), CPU, seed=number)
            for number, piece in enumerate(self.pieces)
        ]
        self.whole: Any = model.build_model(config, 3)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():  # large enough that every part shapes the result; norms and biases not trivial
            for parameter in self.whole.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        anchor = np.concatenate([parameter.detach().numpy().ravel() for parameter in self.whole.parameters()])
        first = 0
        for replica in self.replicas:
            last = first + len(replica.read())
            replica.load(anchor[first:last])
            first = last
        weights = np.concatenate([replica.read() for replica in self.replicas])
        with torch.no_grad():
            for name, view in model.build_layout(config).views(weights).items():
                self.whole.get_parameter(name).copy_(torch.from_numpy(view))

    def logits(self, tokens: np.ndarray = TOKENS) -> torch.Tensor:
        value = torch.from_numpy(tokens[:, :-1])
        with torch.no_grad():
            for piece, span in zip(self.pieces, self.spans, strict=True):
                value = forward(piece, span, value)
        return value

    def train(self, tokens: np.ndarray = TOKENS, weight: float = WEIGHT) -> list[Trained]:
        """One microbatch through all spans and back, as peers hand it on; what came of it, first span first."""
        came: list[Trained] = []

        def enter(number: int, hidden: torch.Tensor | None) -> torch.Tensor | None:
            is_last = number + 1 == len(self.replicas)
            given = Microbatch(
                tokens=tokens,
                weight=weight,
                hidden_BLH=hidden,
                onward=None if is_last else lambda passed: enter(number + 1, passed),
            )
            came.append(self.replicas[number].train_microbatch(given))
            return came[-1].gradient_BLH

        enter(0, None)
        return came[::-1]

    def step(self, batches: list[np.ndarray], learning_rate: float = 1e-2) -> list[list[Trained]]:
        """One inner step of every replica, a microbatch for each of ``batches``."""
        weight = 1 / sum(batch[:, 1:].size for batch in batches)
        contexts = [replica.inner_step(learning_rate, len(batches)) for replica in self.replicas]
        for context in contexts:
            context.__enter__()
        came = [self.train(batch, weight) for batch in batches]
        for context in contexts:
            context.__exit__(None, None, None)
        return came

    def watch_gradients(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
        """Fills with every parameter's gradient when its update is due; nothing is updated."""
        seen: dict[str, torch.Tensor] = {}
        names = {
            id(member): entry.name
            for replica in self.replicas
            for member, entry in zip(replica._members, replica._layout.entries, strict=True)
        }

        def note(matrix: Int8Matrix, norm: float, gradient_of: Any) -> None:
            seen[names[id(matrix)]] = gradient_of(0, matrix.rows).clone()

        monkeypatch.setattr(Int8Matrix, "_update", note)
        for replica in self.replicas:

            def note_vectors(step: Any, replica: Int8Replica = replica) -> float:
                seen.update({names[id(vector)]: vector.grad.clone() for vector in replica._vectors})
                return 0.0

            monkeypatch.setattr(replica, "_update_vectors", note_vectors)
        return seen

    def exact_gradients(self, tokens: np.ndarray = TOKENS) -> tuple[float, dict[str, torch.Tensor]]:
        """The whole model's loss, and gradients by name."""
        batch = torch.from_numpy(tokens)
        logits = self.whole(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in self.whole.named_parameters()}

    def state(self) -> list[bytes]:
        return [
            tensor.detach().numpy().tobytes() for replica in self.replicas for tensor in replica.persistent_tensors()
        ]


@every_cut
@every_family
def test_spans_give_the_logits_of_the_dequantised_whole_bit_for_bit(family: str, sizes: tuple[int, ...]) -> None:
    pipeline = Pipeline(family, sizes)
    with torch.no_grad():
        wanted = pipeline.whole(input_ids=torch.from_numpy(TOKENS[:, :-1]), use_cache=False).logits
    assert torch.equal(pipeline.logits(), wanted)


@every_family
def test_row_tiles_change_logits_by_rounding_at_most(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix above 4 M values is multiplied tile by tile: the library may then sum in another order."""
    pipeline = Pipeline(family, CUTS[1])
    exact = pipeline.logits()
    monkeypatch.setattr(int8_matrix, "WHOLE_VALUES", 256)
    monkeypatch.setattr(int8_matrix, "TILE_VALUES", 256)
    assert ((pipeline.logits() - exact).abs().max() / exact.abs().max()).item() <= 1e-6


@every_cut
@every_family
def test_spans_give_every_gradient_of_the_dequantised_whole(
    family: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(family, sizes)
    seen = pipeline.watch_gradients(monkeypatch)
    [came] = pipeline.step([TOKENS])
    loss, exact = pipeline.exact_gradients()
    assert came[-1].loss * WEIGHT == pytest.approx(loss, rel=1e-6)
    assert [trained.gradient_BLH is None for trained in came] == [True] + [False] * (len(sizes) - 1)
    assert seen.keys() == exact.keys()
    for name, gradient in exact.items():
        error = (seen[name] - gradient.reshape(seen[name].shape)).abs().max() / gradient.abs().max()
        # The head's gradient alone is kept in bf16: its parts come token chunk by token chunk.
        assert error <= (4e-3 if name.startswith("lm_head.weight") else 1e-5), name


@every_family
def test_microbatches_of_an_inner_step_add_up(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(family, CUTS[0])
    seen = pipeline.watch_gradients(monkeypatch)
    came = pipeline.step([TOKENS[:1], TOKENS[1:]])
    loss, exact = pipeline.exact_gradients()
    assert sum(trained[-1].loss for trained in came) * WEIGHT == pytest.approx(loss, rel=1e-6)
    assert seen.keys() == exact.keys()
    for name, gradient in exact.items():
        error = (seen[name] - gradient.reshape(seen[name].shape)).norm() / gradient.norm()
        assert error <= 8e-3, name  # they add up in bf16


@every_family
def test_spans_learn_together(family: str) -> None:
    pipeline = Pipeline(family, CUTS[2])
    tokens = np.arange(2 * (LENGTH + 1)).reshape(2, -1) % VOCAB
    losses = [pipeline.step([tokens])[0][-1].loss for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("span", from_sizes((2, 3, 2)), ids=str)
def test_a_spans_step_is_its_part_of_a_whole_models_step(span: Span) -> None:
    """The movement of a span's replica is that span's part of what a whole replica does, rounding apart."""
    pipeline, whole = Pipeline("llama", (2, 3, 2)), Pipeline("llama", (7,))
    number = pipeline.spans.index(span)
    pipeline.step([TOKENS], 1e-1)
    result = whole.replicas[0].step(TOKENS, 1e-1)
    start = sum(len(replica.read()) for replica in pipeline.replicas[:number])
    moved = pipeline.replicas[number].movement()[:]
    wanted = whole.replicas[0].movement()[start : start + len(moved)]
    assert result.ok and np.corrcoef(moved, wanted)[0, 1] > 0.9


def test_a_loss_that_is_not_finite_changes_no_span() -> None:
    pipeline = Pipeline("llama", CUTS[1])
    pipeline.step([TOKENS])
    with torch.no_grad():
        pipeline.replicas[-1]._vectors[-1].fill_(math.inf)
    before = pipeline.state()
    [came] = pipeline.step([TOKENS])
    assert all(math.isnan(trained.loss) and trained.gradient_BLH is None for trained in came)
    assert pipeline.state() == before


def test_one_microbatch_whose_loss_is_not_finite_undoes_the_inner_step() -> None:
    """Neither matrices nor vectors take the gradients of the microbatches before it."""
    pipeline = Pipeline("gpt_neo", CUTS[0])
    pipeline.step([TOKENS])
    before = pipeline.state()
    with contextlib.ExitStack() as stack:
        for replica in pipeline.replicas:
            stack.enter_context(replica.inner_step(1e-2, 2))
        losses = [pipeline.train(TOKENS, weight)[-1].loss for weight in (WEIGHT, math.inf)]
    assert math.isfinite(losses[0]) and math.isnan(losses[1])
    assert pipeline.state() == before


HIDDEN = [
    ("none", None),
    ("another length", torch.zeros(2, LENGTH - 1, 16)),
    ("another batch", torch.zeros(3, LENGTH, 16)),
    ("two dimensions", torch.zeros(2, LENGTH)),
    ("whole numbers", torch.zeros(2, LENGTH, 16, dtype=torch.long)),
]


@pytest.mark.parametrize(("name", "hidden"), HIDDEN, ids=[case[0] for case in HIDDEN])
def test_hidden_states_that_do_not_fit_are_refused(name: str, hidden: torch.Tensor | None) -> None:
    replica = Pipeline("llama", CUTS[0]).replicas[1]
    with replica.inner_step(1e-2, 1), pytest.raises(DataError, match="hidden states of 2 sequences of 24 tokens"):
        replica.train_microbatch(Microbatch(tokens=TOKENS, weight=WEIGHT, hidden_BLH=hidden))


def test_a_span_that_is_not_the_whole_model_has_no_loss_of_its_own() -> None:
    first, last = Pipeline("llama", CUTS[0]).replicas
    with pytest.raises(SwarmError, match="needs the spans after it"):
        first.step(TOKENS, 1e-2)
    for replica in (first, last):
        with pytest.raises(SwarmError, match="no loss of its own"):
            replica.evaluate(replica.read(), [TOKENS])
