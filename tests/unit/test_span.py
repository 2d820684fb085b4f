"""Spans: for every family, the pieces together compute what the whole computes, and have its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peer.training import model
from peer.training.span import forward, initial_values, materialise
from swarm.errors import SwarmError
from swarm.families import FAMILIES, family_of
from swarm.sharding import Span, from_sizes, whole
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, WINDOW, small_config, small_spec

SEED = 3
CUTS = [(2, 5), (4, 1, 2), (1, 3, 2, 1)]  # layers per shard: uneven
TOLERANCE = 1e-5  # relative, of the largest value of a tensor
TOKENS = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are not worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lively(config: Any, seed: int = SEED) -> torch.nn.Module:
    """The whole model with weights large enough that every part shapes the result; norms and biases not trivial."""
    built = model.build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return built


def spans_of(config: Any, sizes: tuple[int, ...], weights: dict[str, torch.Tensor]) -> list[tuple[Span, Any]]:
    """One module per shard, with its share of ``weights``."""
    pieces = []
    for span in from_sizes(sizes):
        piece = model.build_span(config, span)
        materialise(piece, ((name, weights[name].clone()) for name, _ in piece.named_parameters()))
        pieces.append((span, piece))
    return pieces


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


def pipeline(pieces: list[tuple[Span, Any]]) -> torch.Tensor:
    """Logits, after a backward pass that hands gradients of hidden states from span to span, as peers do."""
    value, sent, received = TOKENS[:, :-1], [], []
    for span, piece in pieces:
        received.append(value)
        value = forward(piece, span, value)
        sent.append(value)
        value = value.detach().requires_grad_()
    loss_of(sent[-1]).backward()
    for hidden, output in zip(reversed(received[1:]), reversed(sent[:-1]), strict=True):
        output.backward(hidden.grad)
    return sent[-1]


def relative(value: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((value - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_together_give_the_logits_and_every_gradient_of_the_whole(family: str, sizes: tuple[int, ...]) -> None:
    config = small_config(family)
    built = lively(config)
    pieces = spans_of(config, sizes, dict(built.named_parameters()))
    wanted = built(input_ids=TOKENS[:, :-1], use_cache=False).logits
    loss_of(wanted).backward()
    logits = pipeline(pieces)
    assert relative(logits, wanted) <= TOLERANCE
    gradients = {name: parameter.grad for _, piece in pieces for name, parameter in piece.named_parameters()}
    whole_gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    assert list(gradients) == list(whole_gradients)
    errors = {name: relative(gradients[name], gradient) for name, gradient in whole_gradients.items()}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_have_the_initial_weights_of_the_whole(family: str) -> None:
    config = small_config(family)
    together = [model.initial_anchor(config, SEED, span) for span in from_sizes((1, 4, 2))]
    assert np.concatenate(together).tobytes() == model.initial_anchor(config, SEED).tobytes()
    entries = [entry.name for span in from_sizes((1, 4, 2)) for entry in model.build_layout(config, span).entries]
    assert entries == [entry.name for entry in model.build_layout(config).entries]


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_are_drawn_as_the_family_draws_them(family: str) -> None:
    """Each parameter has the mean and the spread that transformers itself gives it; no two matrices are equal."""
    config = small_config(family)
    ours = model.build_model(config, SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        theirs = {name: value.detach() for name, value in type(ours)(config).named_parameters()}
    for name, parameter in ours.named_parameters():
        value = parameter.detach()
        assert abs(float(value.mean() - theirs[name].mean())) < 0.01, name
        assert float(value.std(correction=0)) == pytest.approx(float(theirs[name].std(correction=0)), rel=0.4), name
    matrices = [parameter.detach().numpy().tobytes() for parameter in ours.parameters() if parameter.ndim == 2]
    assert len(set(matrices)) == len(matrices) > NUM_LAYERS


@pytest.mark.parametrize("family", ["gpt_neo", "bloom", "llama"])
def test_a_tied_matrix_is_one_in_a_whole_model_and_starts_as_the_embedding_does(family: str) -> None:
    built = model.build_model(small_config(family, tied=True), SEED)
    parts = family_of(family)
    head = f"{parts.head}.weight"
    embedding = f"{parts.base}.{parts.embedding}.weight"
    assert built.get_parameter(head) is built.get_parameter(embedding)
    untied = dict(model.build_model(small_config(family), SEED).named_parameters())
    assert torch.equal(built.get_parameter(embedding), untied[embedding])
    assert not torch.equal(untied[head], untied[embedding])


def test_a_tied_model_is_not_cut() -> None:
    with pytest.raises(SwarmError, match="untied"):
        model.build_span(small_config("llama", tied=True), from_sizes((3, 4))[0])


def test_a_span_of_another_model_is_refused() -> None:
    with pytest.raises(SwarmError, match="does not fit one of 7"):
        model.build_span(small_config("llama"), whole(8))


@pytest.mark.parametrize("family", ["gpt_neo", "mistral"])
def test_local_attention_reaches_no_further_than_its_window_in_a_later_span(family: str) -> None:
    """One local layer in the middle of the model: a token is felt within the window and not beyond it."""
    config = small_config(family)
    span = Span(first=1, last=2, num_layers=NUM_LAYERS)
    [piece] = [
        piece for cut, piece in spans_of(config, (1, 1, 5), dict(lively(config).named_parameters())) if cut == span
    ]
    hidden = torch.randn((1, LENGTH, config.hidden_size), generator=torch.Generator().manual_seed(2))
    changed = hidden.clone()
    changed[0, 3, 0] += 1
    differs = (forward(piece, span, hidden) != forward(piece, span, changed)).any(dim=2)[0]
    assert differs.nonzero().flatten().tolist() == list(range(3, 3 + WINDOW))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_in_the_middle_takes_no_memory_for_what_it_lacks(family: str) -> None:
    config = small_config(family)
    piece = model.build_span(config, Span(first=2, last=4, num_layers=NUM_LAYERS))
    layers = f"{family_of(family).base}.{family_of(family).layers}."
    names = [name for name, _ in piece.named_parameters()]
    assert {name.removeprefix(layers).split(".")[0] for name in names} == {"2", "3"}
    assert all(parameter.is_meta for parameter in piece.parameters())


def test_masks_of_layers_alike_share_their_memory() -> None:
    piece = model.build_span(small_config("gpt_neo"), whole(NUM_LAYERS))
    masks = [buffer for _, buffer in piece.named_buffers(remove_duplicate=False)]
    assert (len(masks), len({mask.untyped_storage().data_ptr() for mask in masks})) == (NUM_LAYERS, 2)


VALUES = [
    ("one too few", lambda values: values[1:], "no values for"),
    ("an unknown one", lambda values: [*values, ("x", torch.zeros(1))], "no parameter of this span"),
    ("one twice", lambda values: [*values, values[0]], "no parameter of this span"),
    ("another shape", lambda values: [(values[0][0], torch.zeros(3)), *values[1:]], "no parameter of this span"),
]


@pytest.mark.parametrize(("name", "change", "message"), VALUES, ids=[case[0] for case in VALUES])
def test_values_that_are_not_the_spans_are_refused(name: str, change: Any, message: str) -> None:
    piece = model.build_span(small_config("llama"), from_sizes((3, 4))[1])
    values = change(list(initial_values(piece, SEED)))
    with pytest.raises(SwarmError, match=message):
        materialise(piece, values)


def test_a_run_of_more_than_one_shard_unties_embedding_and_head() -> None:
    spec = small_spec("gpt_neo", tied=True)
    assert model.build_config(spec, VOCAB).tie_word_embeddings
    assert not model.build_config(spec.model_copy(update={"num_shards": 2}), VOCAB).tie_word_embeddings
