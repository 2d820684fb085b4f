"""Checkpoints in and out: spans' parameters open in transformers, and a local checkpoint's weights go on training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peer.training import model
from peer.training.span import forward, materialise
from swarm.errors import DataError
from swarm.families import FAMILIES, family_of
from swarm.sharding import from_sizes
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_config

TOKENS = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
SIZES = (2, 4, 1)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def export(folder: Path, config: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """A checkpoint put together from the parameters of three spans."""
    values: dict[str, torch.Tensor] = {}
    for span in from_sizes(SIZES):
        anchor = model.initial_anchor(config, seed, span)
        views = model.build_layout(config, span).views(anchor)
        values |= {name: torch.from_numpy(view.copy()) for name, view in views.items()}
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(model.config_json(config))
    return values


def logits_of_spans(config: Any, folder: Path) -> torch.Tensor:
    value = TOKENS
    for span in from_sizes(SIZES):
        piece = model.build_span(config, span)
        materialise(piece, model.stored_values(config, piece, folder))
        with torch.no_grad():
            value = forward(piece, span, value)
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_what_spans_export_opens_in_transformers_with_the_same_logits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = small_config(family)
    export(tmp_path, config)
    opened, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        wanted = opened(input_ids=TOKENS, use_cache=False).logits
    logits = logits_of_spans(config, tmp_path)
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_from_what_transformers_saved(family: str, tmp_path: Path) -> None:
    """In several files, as large checkpoints are; read into the anchors of spans."""
    config = small_config(family)
    saved = model.build_model(config, 5)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    assert (tmp_path / INDEX).is_file()
    anchors = [model.initial_anchor(config, 0, span, tmp_path) for span in from_sizes(SIZES)]
    assert np.concatenate(anchors).tobytes() == model.initial_anchor(config, 5).tobytes()


def test_a_span_reads_only_its_own_tensors(tmp_path: Path) -> None:
    config = small_config("llama")
    values = export(tmp_path, config)
    middle = from_sizes(SIZES)[1]
    names = [entry.name for entry in model.build_layout(config, middle).entries]
    save_file({name: values[name] for name in names}, tmp_path / WEIGHTS)
    assert len(model.initial_anchor(config, 0, middle, tmp_path)) > 0
    with pytest.raises(DataError, match=r"has no tensor model\.embed_tokens\.weight"):
        model.initial_anchor(config, 0, None, tmp_path)


OTHER_NAMES = [
    ("an older head", "gpt_neox", lambda name: name.replace("lm_head.", "embed_out.")),
    ("a base model's names", "bloom", lambda name: name.removeprefix("transformer.")),
]


@pytest.mark.parametrize(("name", "family", "rename"), OTHER_NAMES, ids=[case[0] for case in OTHER_NAMES])
def test_older_names_are_understood(name: str, family: str, rename: Any, tmp_path: Path) -> None:
    config = small_config(family)
    values = export(tmp_path, config)
    save_file({rename(key): value for key, value in values.items()}, tmp_path / WEIGHTS)
    assert model.initial_anchor(config, 0, None, tmp_path).tobytes() == model.initial_anchor(config, 1).tobytes()


def test_a_tied_checkpoint_gives_an_untied_run_its_embedding_as_head(tmp_path: Path) -> None:
    model.build_model(small_config("gpt_neo", tied=True), 5).save_pretrained(tmp_path)  # type: ignore[operator]
    config = small_config("gpt_neo")
    built = model.build_span(config, from_sizes((NUM_LAYERS,))[0])
    materialise(built, model.stored_values(config, built, tmp_path))
    parts = family_of("gpt_neo")
    embedding = built.get_parameter(f"{parts.base}.{parts.embedding}.weight")
    assert torch.equal(built.get_parameter(f"{parts.head}.weight"), embedding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    config = small_config("llama")
    values = export(tmp_path, config)
    save_file({name: value.to(dtype) for name, value in values.items()}, tmp_path / WEIGHTS)
    rounded = np.concatenate([value.to(dtype).float().numpy().reshape(-1) for value in values.values()])
    assert model.initial_anchor(config, 0, None, tmp_path).tobytes() == rounded.tobytes()


def _change(folder: Path, change: Any) -> None:
    values = load_file(folder / WEIGHTS)
    change(values)
    save_file(values, folder / WEIGHTS)


def _without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"code")


def _index(folder: Path, index: Any) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))


NORM = "model.norm.weight"
BAD = [
    ("only a format that holds code", _without_weights, "no checkpoint in safetensors"),
    (
        "cut short",
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]),
        "cannot be read",
    ),
    ("another shape", lambda folder: _change(folder, lambda v: v.update({NORM: torch.ones(3)})), r"has shape \[3\]"),
    ("quantised", lambda folder: _change(folder, lambda v: v.update({NORM: v[NORM].to(torch.int8)})), "not a float"),
    ("not finite", lambda folder: _change(folder, lambda v: v[NORM].fill_(torch.nan)), "not finite"),
    ("a tensor short", lambda folder: _change(folder, lambda v: v.pop(NORM)), f"no tensor {NORM}"),
    ("an index that is no JSON", lambda folder: _index(folder, "{"), "cannot be read"),
    ("an index of nothing", lambda folder: _index(folder, {}), "has no weight_map"),
    (
        "an index that leaves",
        lambda folder: _index(folder, {"weight_map": {NORM: "../x.safetensors"}}),
        "no file beside",
    ),
    ("an index of code", lambda folder: _index(folder, {"weight_map": {NORM: "x.bin"}}), "no file beside"),
    (
        "a file that is not there",
        lambda f: _index(f, {"weight_map": {"model.embed_tokens.weight": "x.safetensors"}}),
        "cannot",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=[case[0] for case in BAD])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(name: str, spoil: Any, message: str, tmp_path: Path) -> None:
    config = small_config("llama")
    export(tmp_path, config)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        model.initial_anchor(config, 0, None, tmp_path)
    assert "\n" not in str(caught.value)
