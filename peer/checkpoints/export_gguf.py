"""A checkpoint as one GGUF file, as llama.cpp and its kin open it: LLaMA and Mistral families.

Decides names, order of rows, metadata and vocabulary, as llama.cpp's own converter does; this is the door to ``gguf``.
What that format cannot say of a model is refused by name, never left out. Leaves checking the origin to the caller.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peer.checkpoints.export_hf import OnTensor, origin_of, refuse_existing
from peer.checkpoints.facts import FolderFacts
from peer.checkpoints.weights import Weights
from swarm.data_manifest import TOKENIZER_NAME
from swarm.errors import ConfigError, DataError
from swarm.files import disk_errors, fsync_folder

FAMILIES = ("llama", "mistral")
DTYPES = ("fp32", "fp16", "bf16")
_ADVICE = "export it with --to hf; transformers opens that"


def export_gguf(facts: FolderFacts, out: Path, dtype: str, on_tensor: OnTensor = lambda: None) -> Path:
    """Write the new file ``out``, whole or not at all.

    Raises `ConfigError` for an ``out`` that exists, a dtype that is none, or without the package ``gguf``; `DataError`
    for a model or tokenizer that GGUF's llama architecture cannot hold; `DiskFull`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"{dtype!r} is no format of weights", f"choose one of {', '.join(DTYPES)}")
    refuse_existing(out)
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("the package gguf is not installed", "pip install 'swarmtrain[gguf]'") from error
    config = json.loads((facts.folder / "config.json").read_bytes())
    _refuse_what_gguf_lacks(facts, config)
    tokenizer = json.loads((facts.folder / TOKENIZER_NAME).read_bytes())
    building = out.parent / f".{out.name}.building"
    writer = gguf.GGUFWriter(building, "llama")
    try:
        with disk_errors(out):
            _add_metadata(writer, facts, config, dtype)
            _add_vocabulary(writer, tokenizer, int(config["vocab_size"]), facts.card.data.end_of_text_id)
            _add_tensors(writer, facts, config, dtype, on_tensor)
            out.parent.mkdir(parents=True, exist_ok=True)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with open(building, "rb") as file:
                os.fsync(file.fileno())
            os.replace(building, out)
            fsync_folder(out.parent)
    finally:
        writer.close()
        building.unlink(missing_ok=True)
    return out


def _refuse_what_gguf_lacks(facts: FolderFacts, config: dict[str, Any]) -> None:
    family = facts.provenance.spec.model.family
    if family not in FAMILIES:
        raise DataError(f"GGUF export knows the families {' and '.join(FAMILIES)}, not {family}", _ADVICE)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise DataError("GGUF export knows plain rotary positions only, not scaled ones", _ADVICE)
    if config.get("hidden_act", "silu") != "silu":
        raise DataError(f"GGUF's llama computes with silu, not {config['hidden_act']!r}", _ADVICE)


def _add_metadata(writer: Any, facts: FolderFacts, config: dict[str, Any], dtype: str) -> None:
    import gguf

    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    context = int(config["max_position_embeddings"])
    # llama.cpp's llama has no window: beyond the window the model would see what it never saw in training.
    window = config.get("sliding_window") or context
    writer.add_name(f"{facts.provenance.spec.name} round {facts.card.round}")
    writer.add_license(facts.provenance.spec.checkpoints.licence)
    writer.add_context_length(min(context, int(window)))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config).get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    kinds = {"fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(kinds.get(dtype, gguf.LlamaFileType.MOSTLY_BF16))
    for key, value in origin_of(facts).items():
        writer.add_string(f"swarmtrain.{key}", str(value))


def _add_vocabulary(writer: Any, tokenizer: dict[str, Any], vocab_size: int, end_of_text_id: int) -> None:
    import gguf

    model = tokenizer.get("model", {})
    splitter = tokenizer.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or splitter.get("type") != "ByteLevel" or splitter.get("use_regex") is False:
        raise DataError("GGUF export knows byte-level BPE tokenizers that split as GPT-2's does", _ADVICE)
    if tokenizer.get("normalizer") is not None:
        raise DataError("GGUF export knows tokenizers without a normalizer", _ADVICE)
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [int(gguf.TokenType.UNUSED)] * vocab_size
    special = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    named = {
        **{number: text for text, number in model["vocab"].items()},
        **{k: v["content"] for k, v in special.items()},
    }
    for number, text in named.items():
        if not 0 <= number < vocab_size:
            raise DataError(f"the tokenizer's token {number} is beyond the model's vocabulary of {vocab_size}", _ADVICE)
        tokens[number] = text
        is_special = number in special and special[number].get("special", False)
        kinds[number] = int(gguf.TokenType.CONTROL if is_special else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(end_of_text_id)
    writer.add_eos_token_id(end_of_text_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(bool(splitter.get("add_prefix_space")))


def _add_tensors(writer: Any, facts: FolderFacts, config: dict[str, Any], dtype: str, on_tensor: OnTensor) -> None:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(config["num_hidden_layers"]))
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    wide = {"fp32": gguf.GGMLQuantizationType.F32, "fp16": gguf.GGMLQuantizationType.F16}
    kind = wide.get(dtype, gguf.GGMLQuantizationType.BF16)
    weights = Weights(facts.folder, facts.provenance.manifest)
    for name in weights.shapes:
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise DataError(f"GGUF's llama has no place for {name[:80]!r}", _ADVICE)
        tensor = weights.read(name)
        if ".q_proj." in name or ".k_proj." in name:
            tensor = interleaved(tensor, heads if ".q_proj." in name else kv_heads)
        if tensor.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored, tensor)  # vectors stay fp32, as llama.cpp wants them
        else:
            packed = gguf.quants.quantize(tensor, kind)
            if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(packed).all():
                raise DataError(f"{name} holds values beyond {dtype}", "choose bf16 or fp32")
            writer.add_tensor(stored, packed, raw_dtype=kind)
        on_tensor()


def interleaved(tensor: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of a projection as llama.cpp turns them: each pair of a rotation side by side, not half a head apart."""
    shape = tensor.shape
    pairs = tensor.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(shape))
