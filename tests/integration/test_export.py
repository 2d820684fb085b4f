"""Exports: other programs open them, they compute what the checkpoint computes, and they say where they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from peer.checkpoints.card import read_card
from peer.checkpoints.export_gguf import export_gguf
from peer.checkpoints.export_hf import export_hf
from peer.checkpoints.facts import FolderFacts, manifest_digest, read_facts
from peer.checkpoints.weights import Weights
from swarm.cli.export import export
from swarm.digest import sha256
from swarm.errors import ConfigError, DataError
from tests.published_samples import TEXT, Published, publish

app = typer.Typer()
app.command()(export)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("llama") / "c", "llama")


@pytest.fixture(scope="module")
def facts(llama: Published) -> FolderFacts:
    return read_facts(llama.made.folder, None)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    return found


def test_a_bf16_set_opens_in_transformers_with_every_weight_rounded_to_nearest(
    facts: FolderFacts, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export_hf(facts, tmp_path / "bf16", "bf16")
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert model.dtype == torch.bfloat16
    weights = Weights(facts.folder, facts.provenance.manifest)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(weights.read(name)).to(torch.bfloat16)), name
    assert AutoTokenizer.from_pretrained(out, local_files_only=True).decode([0]) == "<|endoftext|>"


def test_a_derived_set_names_its_origin_and_has_a_card_of_its_own(facts: FolderFacts, tmp_path: Path) -> None:
    out = export_hf(facts, tmp_path / "bf16", "bf16")
    origin = json.loads((out / "origin.json").read_bytes())
    assert origin["manifest_digest"] == manifest_digest(facts.provenance)
    assert (origin["round"], origin["dtype"]) == (10, "bf16")
    for name, digest in origin["files"].items():
        assert sha256((out / name).read_bytes()).hex() == digest
    assert set(origin["files"]) == {path.name for path in out.iterdir()} - {"origin.json"}
    card = (out / "README.md").read_text()
    assert read_card(card)["library_name"] == "transformers"
    assert "bfloat16" in card and origin["manifest_digest"] in card and "swarm verify FOLDER" not in card


def test_an_fp32_export_has_the_published_weights(facts: FolderFacts, tmp_path: Path) -> None:
    out = export_hf(facts, tmp_path / "fp32", "fp32")
    for file in facts.provenance.manifest.files:
        if file.name.endswith(".safetensors"):
            assert sha256((out / file.name).read_bytes()).hex() == file.sha256


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_reads_the_gguf_file_back_to_the_same_model_and_tokenizer(family: str, tmp_path: Path) -> None:
    """Its reader is not ours: it turns the rows back, so a wrong order of rows changes the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    published = publish(tmp_path / "c", family)
    path = export_gguf(read_facts(published.made.folder, None), tmp_path / "model.gguf", "fp32")
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf", local_files_only=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf", local_files_only=True)
    ids = published.tokenizer.encode(TEXT).ids
    assert tokenizer.encode(TEXT) == ids
    assert torch.equal(logits(model, ids), logits(published.model, ids))


def test_the_gguf_file_holds_the_rounded_tensors_the_vocabulary_and_the_origin(
    facts: FolderFacts, llama: Published, tmp_path: Path
) -> None:
    reader = gguf.GGUFReader(export_gguf(facts, tmp_path / "model.gguf", "bf16"))
    field = {name: found.contents() for name, found in reader.fields.items()}
    assert field["general.architecture"] == "llama"
    assert field["llama.context_length"] == 64
    assert field["llama.rope.freq_base"] == pytest.approx(llama.model.config.rope_parameters["rope_theta"])
    assert field["swarmtrain.manifest_digest"] == manifest_digest(facts.provenance)
    vocabulary = llama.tokenizer.get_vocab()
    assert field["tokenizer.ggml.tokens"] == sorted(vocabulary, key=vocabulary.__getitem__)
    assert field["tokenizer.ggml.eos_token_id"] == 0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = Weights(facts.folder, facts.provenance.manifest)
    assert len(tensors) == len(weights.shapes)
    wanted = torch.from_numpy(weights.read("model.layers.1.mlp.up_proj.weight")).to(torch.bfloat16).float().numpy()
    packed = tensors["blk.1.ffn_up.weight"]
    assert packed.tensor_type == gguf.GGMLQuantizationType.BF16
    assert np.array_equal(gguf.quants.dequantize(packed.data, packed.tensor_type), wanted)
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_a_gguf_export_of_another_family_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    published = publish(tmp_path / "c", "gpt_neo")
    with pytest.raises(DataError, match="not gpt_neo"):
        export_gguf(read_facts(published.made.folder, None), tmp_path / "model.gguf", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


REFUSED_TOKENIZERS: dict[str, dict[str, Any]] = {
    "sentencepiece": {"model": {"type": "Unigram", "vocab": []}},
    "another splitter": {"pre_tokenizer": {"type": "Whitespace"}},
    "its own pattern": {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}},
    "a normalizer": {"normalizer": {"type": "NFC"}},
}


@pytest.mark.parametrize("change", REFUSED_TOKENIZERS.values(), ids=REFUSED_TOKENIZERS.keys())
def test_a_tokenizer_that_gguf_would_read_otherwise_is_refused(
    llama: Published, facts: FolderFacts, change: dict[str, Any], tmp_path: Path
) -> None:
    import shutil

    copy = Path(shutil.copytree(llama.made.folder, tmp_path / "c"))
    tokenizer = json.loads((copy / "tokenizer.json").read_bytes())
    (copy / "tokenizer.json").write_text(json.dumps({**tokenizer, **change}))
    with pytest.raises(DataError, match="GGUF export knows"):
        export_gguf(replace(facts, folder=copy), tmp_path / "model.gguf", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_what_exists_is_never_replaced_and_formats_are_named(facts: FolderFacts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for work in (export_hf, export_gguf):
        with pytest.raises(ConfigError, match="exists already"):
            work(facts, tmp_path / "out", "bf16")
        with pytest.raises(ConfigError, match="no format"):
            work(facts, tmp_path / "new", "int3")


def test_the_command_writes_beside_the_checkpoint_and_tells_where(llama: Published, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        [str(llama.made.folder), "--to", "gguf", "--dtype", "fp16", "--out", str(tmp_path / "m.gguf"), "--json"],
        catch_exceptions=False,
    )
    told = json.loads(done.stdout)
    assert told["size_bytes"] == (tmp_path / "m.gguf").stat().st_size
