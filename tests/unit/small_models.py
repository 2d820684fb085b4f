"""Configs of every family, as small as show all that is special about it; seven layers where spans are cut."""

from __future__ import annotations

import functools
from typing import Any

from peer.training import model
from swarm.run_spec import Data, Model, RunSpec

VOCAB = 61
NUM_LAYERS = 7
LENGTH = 24  # tokens in a sequence: longer than the windows below
WINDOW = 5
HEX = "00" * 32

CONFIGS: dict[str, dict[str, Any]] = {
    # Layers alternate global and local attention; the window is shorter than a sequence.
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": NUM_LAYERS,
        "num_heads": 2,
        "max_position_embeddings": 32,
        "window_size": WINDOW,
    },
    "gptj": {"n_embd": 16, "n_layer": NUM_LAYERS, "n_head": 2, "rotary_dim": 4, "n_positions": 32},
    "gpt_neox": {
        "hidden_size": 16,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    },
    # Three heads: ALiBi's slopes for a number that is no power of two.
    "bloom": {"hidden_size": 24, "n_layer": NUM_LAYERS, "n_head": 3},
    "llama": {
        "hidden_size": 16,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    },
    "mistral": {
        "hidden_size": 16,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "sliding_window": WINDOW,
    },
}


def small_spec(family: str, *, tied: bool = False, **changes: Any) -> RunSpec:
    config = {**CONFIGS[family], "tie_word_embeddings": tied, **changes}
    return RunSpec(
        name="small",
        total_tokens=1000,
        organizer_key=HEX,
        publication_key="1" * 64,
        model=Model(family=family, config=config),
        data=Data(manifest_digest=HEX, tokenizer_digest=HEX, sequence_length=LENGTH),
    )


@functools.cache
def small_config(family: str, *, tied: bool = False, **changes: Any) -> Any:
    return model.build_config(small_spec(family, tied=tied, **changes), VOCAB)
