"""Published checkpoints of real, tiny models of every family, with a tokenizer trained on one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.checkpoints.checkpoint import CheckpointParts
from peer.training.model import build_config, build_model, config_json
from swarm.run_spec import RunSpec
from tests.checkpoint_samples import (
    SignedCheckpoint,
    data_manifest,
    make_spec,
    shard_parts_of,
    signed_checkpoint,
)

TEXT = "The quick brown fox jumps over the lazy dog. Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich 🦊."
VOCAB_SIZE = 300

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "mistral": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@dataclass(frozen=True, slots=True)
class Published:
    """A signed checkpoint, the model that it was made of, and its tokenizer."""

    made: SignedCheckpoint
    model: Any
    tokenizer: Any


def train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    return tokenizer


def publish(folder: Path, family: str) -> Published:
    tokenizer = train_tokenizer()
    tokenizer_json = tokenizer.to_str().encode()
    data = data_manifest(tokenizer_json, tokenizer.get_vocab_size())
    values = make_spec(data).model_dump()
    values["model"] = {"family": family, "config": CONFIGS[family]}
    values["data"]["sequence_length"] = 16
    spec = RunSpec.model_validate(values)
    config = build_config(spec, tokenizer.get_vocab_size())
    model = build_model(config, seed=1).eval()
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    parts = CheckpointParts(
        run_id=spec.run_id,
        spec=spec,
        data=data,
        data_json=data.canonical_bytes(),
        round=10,
        total_tokens=1000,
        states=(shard_parts_of(tensors),),
        config_json=config_json(config),
        tokenizer_json=tokenizer_json,
        tensors=tensors,
        max_file_bytes=60_000,  # several files with an index, as large models have
    )
    return Published(signed_checkpoint(folder, parts), model, tokenizer)
