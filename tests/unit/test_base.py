"""A run that starts from a checkpoint: what must agree, what is signed, and what an organizer is told otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peer.checkpoints.card import CardFacts, model_card
from peer.rounds.shard import Shard
from peer.training import model
from peer.training.base import read_base
from swarm import presets, run_file
from swarm.cli.organizer import prepare_run
from swarm.data_manifest import DataManifest
from swarm.digest import chunk_digests, merkle_root, sha256
from swarm.errors import ConfigError, DataError
from swarm.families import FAMILIES
from swarm.proto.common_pb2 import Genesis
from swarm.run_spec import Base, RunSpec
from tests.checkpoint_samples import make_parts
from tests.unit.small_models import VOCAB, small_config, small_spec

TOKENIZER = b'{"a tokenizer": 1}'
MANIFEST = DataManifest.model_validate(
    {
        "tokenizer_digest": sha256(TOKENIZER).hex(),
        "vocab_size": VOCAB,
        "end_of_text_id": 0,
        "dtype": "uint16",
        "train": [{"file": "train-00000.bin", "digest": "aa" * 32, "num_tokens": 1000}],
        "validation": [{"file": "validation-00000.bin", "digest": "aa" * 32, "num_tokens": 1000}],
        "sources": [],
    }
)


def spec_of(family: str = "llama", **changes: Any) -> RunSpec:
    spec = small_spec(family, **changes)
    data = spec.data.model_copy(update={"tokenizer_digest": MANIFEST.tokenizer_digest})
    return spec.model_copy(update={"data": data})


def write_checkpoint(folder: Path, config: Any, seed: int = 9) -> np.ndarray:
    """As transformers writes it, with a tokenizer; gives the weights."""
    built: Any = model.build_model(config, seed)
    built.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    return model.initial_anchor(config, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_any_family_is_named_by_its_weights(family: str, tmp_path: Path) -> None:
    """The digest is that of the anchor's own half of the state digest: whoever has the state of round 0 can check."""
    weights = write_checkpoint(tmp_path / "good one", small_config(family))
    base, anchor = read_base(tmp_path / "good one", spec_of(family), MANIFEST)
    assert anchor.tobytes() == weights.tobytes()
    assert (base.name, base.vocab_size) == ("good one", VOCAB)
    assert base.anchor_digest == merkle_root(chunk_digests(memoryview(weights.tobytes()))).hex()
    assert base.anchor_digest == merkle_root(Shard(spec_of(family), 0, anchor).chunk_digests()[0]).hex()


def test_a_padded_vocabulary_keeps_its_rows(tmp_path: Path) -> None:
    """Publishers pad embeddings: every peer then builds the model with as many rows."""
    weights = write_checkpoint(tmp_path, model.build_config(spec_of(), VOCAB + 3))
    base, anchor = read_base(tmp_path, spec_of(), MANIFEST)
    assert anchor.tobytes() == weights.tobytes() and base.vocab_size == VOCAB + 3
    config = model.build_config(spec_of().model_copy(update={"base": base}), VOCAB)
    assert config.vocab_size == VOCAB + 3 and model.build_layout(config).num_values == len(anchor)


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


def _as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("no folder", lambda f: shutil.rmtree(f), "config.json cannot be read", "Hugging Face layout"),
    ("no JSON", lambda f: (f / "config.json").write_text("{"), "is not JSON", "again"),
    ("deeply nested", lambda f: (f / "config.json").write_text("[" * 9999), "is not JSON", "again"),
    ("a list", lambda f: (f / "config.json").write_text("[]"), "is not a config", "again"),
    ("another family", _config(lambda c: c.update(model_type="bloom")), "of family 'bloom'", "model.family"),
    ("no family", _config(lambda c: c.pop("model_type")), "of family 'None'", "model.family"),
    ("code", _config(lambda c: c.update(auto_map={"AutoConfig": "x.y"})), "asks for code of its own", "never run"),
    ("quantised", _config(lambda c: c.update(quantization_config={})), "is quantised", "made from"),
    ("a silly config", _config(lambda c: c.update(num_attention_heads="x")), "config is none of llama", ""),
    (
        "another width",
        _config(lambda c: c.update(intermediate_size=64, rms_norm_eps=0.5)),
        "intermediate_size is 64, not 32, rms_norm_eps is 0.5, not 1e-06",
        "set in [model.config]: intermediate_size = 64, rms_norm_eps = 0.5",
    ),
    (
        "positions that no run can have",
        _config(lambda c: c.update(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})),
        "rope_parameters.factor is 2.0, not None",
        "use another checkpoint",
    ),
    ("fewer tokens", _config(lambda c: c.update(vocab_size=VOCAB - 1)), "knows 60 tokens", "--tokenizer"),
    ("another tokenizer", lambda f: (f / "tokenizer.json").write_bytes(b"{}"), "another tokenizer", "--tokenizer"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json cannot be read", "tokenizer"),
    ("weights that can be code", _as_pickle, "no checkpoint in safetensors files", "can hold code"),
    ("another shape than it says", _config(lambda c: c.update(vocab_size=VOCAB + 1)), "has shape", "checkpoint"),
]


@pytest.mark.parametrize(("name", "spoil", "message", "advice"), BAD, ids=[case[0] for case in BAD])
def test_a_checkpoint_that_is_not_of_this_run_is_refused_by_name(
    name: str, spoil: Callable[[Path], Any], message: str, advice: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, small_config("llama"))
    spoil(folder)
    with pytest.raises(DataError) as caught:
        read_base(folder, spec_of(), MANIFEST)
    assert message in str(caught.value) and advice in caught.value.advice


def test_a_tied_run_does_not_drop_an_untied_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, small_config("llama"))
    with pytest.raises(DataError, match="tie_word_embeddings is False, not True"):
        read_base(tmp_path, spec_of(tied=True), MANIFEST)


def test_an_untied_run_starts_its_head_as_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, small_config("llama", tied=True))
    _, anchor = read_base(tmp_path, spec_of(), MANIFEST)
    views = model.build_layout(small_config("llama")).views(anchor)
    assert np.array_equal(views["lm_head.weight"], views["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["", "a|b", "a`b", "a\nb", "<b>", "x" * 129])
def test_a_spec_with_a_name_that_breaks_out_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Base(name=name, anchor_digest="0" * 64, vocab_size=5)


def test_the_model_card_says_where_the_weights_came_from() -> None:
    parts = make_parts(num_values=2)
    facts = CardFacts(
        run_id=parts.run_id,
        spec=parts.spec,
        data=parts.data,
        round=parts.round,
        total_tokens=parts.total_tokens,
        state_digest=parts.states[0].state_digest.hex(),
        log_digest=parts.states[0].log_digest.hex(),
        num_parameters=2,
    )
    assert f"| base model | random weights, seed {parts.spec.seed} |" in model_card(facts)
    base = Base(name="a_b*", anchor_digest="5a" * 32, vocab_size=5)
    card = model_card(replace(facts, spec=parts.spec.model_copy(update={"base": base})))
    assert f"| base model | a\\_b\\*, anchor `{'5a' * 32}` |" in card


# ---- swarm start --from ---------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file with prepared data beside it, and a checkpoint in ``checkpoint``."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    (data / "manifest.json").write_text(MANIFEST.model_dump_json())
    (data / "tokenizer.json").write_bytes(TOKENIZER)
    rules = presets.tiny("based")
    (tmp_path / "run" / "run.toml").write_text(run_file.render(rules))
    write_checkpoint(tmp_path / "checkpoint", model.build_config(rules, VOCAB))
    return tmp_path


def test_a_start_from_a_checkpoint_signs_it_and_a_restart_remembers_it(started: Path) -> None:
    rules, folder = started / "run" / "run.toml", started / "checkpoint"
    first = prepare_run(rules, folder)
    assert first.spec.base is not None and first.spec.base.name == "checkpoint"
    genesis = Genesis.FromString(first.source.genesis.payload)
    config = model.build_config(first.spec, VOCAB)
    anchor = model.initial_anchor(config, 0, folder=folder)
    assert genesis.shards[0].state_digest == Shard(first.spec, 0, anchor).state_digest
    for again in (prepare_run(rules), prepare_run(rules, folder)):
        assert again.spec == first.spec and again.source.genesis == first.source.genesis


def test_a_restart_from_another_checkpoint_is_refused(started: Path) -> None:
    rules, folder = started / "run" / "run.toml", started / "checkpoint"
    prepare_run(rules, folder)
    values = load_file(folder / "model.safetensors")
    values["model.norm.weight"] = values["model.norm.weight"] + 1
    save_file(values, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="changed since this run was started"):
        prepare_run(rules, folder)


def test_a_run_of_random_weights_does_not_become_one_of_a_checkpoint(started: Path) -> None:
    rules = started / "run" / "run.toml"
    assert prepare_run(rules).spec.base is None
    with pytest.raises(ConfigError, match="changed since this run was started"):
        prepare_run(rules, started / "checkpoint")
