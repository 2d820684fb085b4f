"""Presets: run files that work as they are, from a minute on a laptop to a 7-billion-parameter model.

Decides sizes (each from a published model) and what follows from them; leaves the file's form to `swarm.run_file`.
One dial, the number of parameters, sets a large run's length: 20 tokens per parameter (Hoffmann et al.,
arXiv 2203.15556), a thousand rounds, and time for each round to cross a home uplink.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from swarm.errors import ConfigError
from swarm.run_file import DataFolder, RunFile
from swarm.run_spec import Checkpoints, Inner, Model, Outer, Rounds

# The demo's dials: how long it learns, how often its peers agree, how soon they give up on one that died.
DEMO_TOTAL_TOKENS = 1_200_000
DEMO_FIRST_TOKENS_PER_ROUND = 8_192
DEMO_TOKENS_PER_ROUND = 32_768
DEMO_GROWTH_ROUNDS = 16
DEMO_LEARNING_RATE = 4e-3
# A narrow model learns little per token from the usual 0.02: half a nat at the demo's length, with DEMO_BETA2.
DEMO_INITIALIZER_RANGE = 0.05
DEMO_BETA2 = 0.99
DEMO_MICROBATCH_SEQUENCES = 4
DEMO_CHECKPOINT_EVERY_ROUNDS = 10
DEMO_REDUCE_TIMEOUT_S = 8.0
DEMO_TAKEOVER_TIMEOUT_S = 6.0
DEMO_STATUS_INTERVAL_S = 1.0

_TOKENS_PER_PARAMETER = 20
_ROUNDS_PER_RUN = 1000
_HOME_UPLINK_BPS = 20_000_000


def tiny(name: str) -> RunFile:
    """A model for tests: learns something within seconds on one core."""
    return RunFile(
        name=name,
        total_tokens=32_768,
        model=Model(family="llama", config=_llama(hidden=64, layers=2, heads=2, intermediate=176, context=128)),
        data=DataFolder(sequence_length=64),
        inner=Inner(learning_rate=5e-3, microbatch_sequences=8),
        outer=Outer(momentum_warmup_rounds=4),
        rounds=Rounds(
            tokens_per_round=4096, reduce_timeout_s=5.0, takeover_timeout_s=4.0, status_interval_s=0.5, max_members=16
        ),
        checkpoints=Checkpoints(every_rounds=4),
    )


def demo(name: str) -> RunFile:
    """What ``scripts/demo`` trains: a LLaMA of half a million parameters, for two minutes on two cores."""
    config = _llama(hidden=128, layers=2, heads=4, intermediate=384, context=256)
    return RunFile(
        name=name,
        total_tokens=DEMO_TOTAL_TOKENS,
        model=Model(family="llama", config=config | {"initializer_range": DEMO_INITIALIZER_RANGE}),
        data=DataFolder(sequence_length=128),
        inner=Inner(
            learning_rate=DEMO_LEARNING_RATE,
            # No warm-up: the learning rate follows committed tokens, so the first round would learn nothing.
            warmup_tokens=0,
            beta2=DEMO_BETA2,
            microbatch_sequences=DEMO_MICROBATCH_SEQUENCES,
        ),
        rounds=Rounds(
            tokens_per_round=DEMO_TOKENS_PER_ROUND,
            first_tokens_per_round=DEMO_FIRST_TOKENS_PER_ROUND,
            growth_rounds=DEMO_GROWTH_ROUNDS,
            reduce_timeout_s=DEMO_REDUCE_TIMEOUT_S,
            takeover_timeout_s=DEMO_TAKEOVER_TIMEOUT_S,
            status_interval_s=DEMO_STATUS_INTERVAL_S,
        ),
        checkpoints=Checkpoints(every_rounds=DEMO_CHECKPOINT_EVERY_ROUNDS),
    )


def gpt_125m(name: str) -> RunFile:
    """GPT-Neo 125M: sizes of EleutherAI/gpt-neo-125m, learning rate of GPT-3 Small (arXiv 2005.14165, table 2.1)."""
    config = {
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "attention_types": [[["global", "local"], 6]],
        "window_size": 256,
        "max_position_embeddings": 2048,
    }
    return _sized(name, Model(family="gpt_neo", config=config), parameters=125_000_000, learning_rate=6e-4)


def llama_1b(name: str) -> RunFile:
    """TinyLlama 1.1B: sizes and learning rate of arXiv 2401.02385 (section 2.2, table 1)."""
    config = _llama(hidden=2048, layers=22, heads=32, intermediate=5632, context=2048)
    config["num_key_value_heads"] = 4
    return _sized(name, Model(family="llama", config=config), parameters=1_100_000_000, learning_rate=4e-4)


def mistral_7b(name: str) -> RunFile:
    """Mistral 7B v0.1: sizes of arXiv 2310.06825 (table 1); learning rate of LLaMA 7B (arXiv 2302.13971, table 2)."""
    config = _llama(hidden=4096, layers=32, heads=32, intermediate=14336, context=32768)
    config |= {"num_key_value_heads": 8, "head_dim": 128, "sliding_window": 4096}
    return _sized(name, Model(family="mistral", config=config), parameters=7_240_000_000, learning_rate=3e-4)


PRESETS: dict[str, Callable[[str], RunFile]] = {
    "tiny": tiny,
    "demo": demo,
    "gpt-125m": gpt_125m,
    "llama-1b": llama_1b,
    "mistral-7b": mistral_7b,
}


def preset(preset_name: str, run_name: str) -> RunFile:
    """The preset of this name, for a run called ``run_name``; `ConfigError` with near names where there is none."""
    make = PRESETS.get(preset_name)
    if make is None:
        near = difflib.get_close_matches(preset_name, PRESETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"no preset {preset_name[:60]!r}{hint}", f"choose one of: {', '.join(PRESETS)}")
    return make(run_name)


def _llama(*, hidden: int, layers: int, heads: int, intermediate: int, context: int) -> dict[str, Any]:
    """A config of the LLaMA family; the small ones tie embedding and head, as most of their weights lie there."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": hidden < 1024,
    }


def _sized(name: str, model: Model, *, parameters: int, learning_rate: float) -> RunFile:
    """A run of ``model`` whose length and deadlines follow from its number of parameters."""
    total_tokens = _TOKENS_PER_PARAMETER * parameters
    tokens_per_round = total_tokens // _ROUNDS_PER_RUN
    return RunFile(
        name=name,
        total_tokens=total_tokens,
        model=model,
        data=DataFolder(sequence_length=2048),
        inner=Inner(
            learning_rate=learning_rate,
            warmup_tokens=total_tokens // 100,
            microbatch_sequences=4 if parameters < 1_000_000_000 else 1,
        ),
        rounds=Rounds(
            tokens_per_round=tokens_per_round,
            first_tokens_per_round=tokens_per_round // 10,
            growth_rounds=_ROUNDS_PER_RUN // 20,
            reduce_timeout_s=_reduce_timeout_s(parameters),
            takeover_timeout_s=60.0,
            lease_s=max(300.0, 2 * _reduce_timeout_s(parameters)),
        ),
        checkpoints=Checkpoints(every_rounds=_ROUNDS_PER_RUN // 20),
    )


def _reduce_timeout_s(parameters: int) -> float:
    """Twice the time in which a home uplink sends its contribution and its average, one byte per parameter each."""
    return float(min(3600, 2 * round(2 * 8 * parameters / _HOME_UPLINK_BPS)))
