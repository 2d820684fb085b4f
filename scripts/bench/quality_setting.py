"""What the arms of the quality benchmark share: a setting, the text, and who reads what of it.

Decides the model, the lengths and the schedules (chosen by the trials in docs/benchmarks.md), the split of the text by
file, and that a replica's batch is a pure function of (seed, replica, inner step). Tokens are bytes: no tokenizer, and
the loss is in nats per byte. Leaves training to `quality_arms`, results and figures to `quality`.
"""

from __future__ import annotations

import dataclasses
import functools
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarm.digest import sha256
from swarm.run_spec import Data, Inner, Model, Outer, Rounds, RunSpec

REPLICAS = 4
VOCAB = 256
SEPARATOR = b"\0"
# Every tenth file is for validation alone.
VALIDATION_EVERY = 10
NOT_TEXT = ("site-packages", "dist-packages", "lib-dynload", "__pycache__", "test*", "idle_test", "lib2to3")
EVALUATION_BATCH = 32

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """``learning_rate`` is the replicas', ``sync_learning_rate`` that of the synchronous arm: each has its own best."""

    hidden: int = 160
    intermediate: int = 448
    layers: int = 3
    heads: int = 5
    initializer_range: float = 0.05
    sequences: int = 4
    length: int = 128
    total_tokens: int = 1_310_720
    learning_rate: float = 4e-3
    sync_learning_rate: float = 4e-3
    min_learning_rate_fraction: float = 0.1
    warmup_tokens: int = 300_000
    beta2: float = 0.99
    outer_learning_rate: float = 1.0
    outer_momentum: float = 0.5
    momentum_warmup_rounds: int = 60
    first_tokens_per_round: int = 2_048
    tokens_per_round: int = 40_960
    growth_rounds: int = 100
    wire_codec: str = "int4"
    validation_sequences: int = 1024

    @property
    def tokens_per_step(self) -> int:
        """Of all replicas together."""
        return REPLICAS * self.sequences * self.length

    @property
    def num_steps(self) -> int:
        return self.total_tokens // self.tokens_per_step

    def changed(self, changes: list[str]) -> Setting:
        """With ``NAME=VALUE`` pairs in place; raises `ValueError` for what is not a setting."""
        kinds = {field.name: type(field.default) for field in dataclasses.fields(self)}
        values: dict[str, Any] = {}
        for change in changes:
            name, _, text = change.partition("=")
            if name not in kinds:
                raise ValueError(f"{name!r} is no setting; there are {', '.join(kinds)}")
            values[name] = kinds[name](text)  # type: ignore[call-arg]
        return dataclasses.replace(self, **values)


SMALL = Setting()
LARGE = Setting(
    hidden=256,
    intermediate=640,
    layers=4,
    heads=8,
    total_tokens=655_360,
    warmup_tokens=150_000,
    growth_rounds=60,
)
QUICK = Setting(
    hidden=32, intermediate=64, layers=1, heads=2, total_tokens=61_440, warmup_tokens=2_048, tokens_per_round=8_192
)


def spec_of(setting: Setting, *, in_8_bits: bool, is_synchronous: bool) -> RunSpec:
    """The run spec that a run with this setting would have."""
    nothing = "0" * 64
    config = {
        "hidden_size": setting.hidden,
        "intermediate_size": setting.intermediate,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "max_position_embeddings": setting.length,
        "initializer_range": setting.initializer_range,
    }
    return RunSpec(
        name="quality",
        total_tokens=setting.total_tokens,
        organizer_key=nothing,
        publication_key="1" * 64,
        model=Model(family="llama", config=config),
        data=Data(manifest_digest=nothing, tokenizer_digest=nothing, sequence_length=setting.length),
        inner=Inner(
            optimizer="adamw8bit" if in_8_bits else "adamw",
            weights="int8" if in_8_bits else "fp32",
            learning_rate=setting.sync_learning_rate if is_synchronous else setting.learning_rate,
            min_learning_rate_fraction=setting.min_learning_rate_fraction,
            warmup_tokens=setting.warmup_tokens,
            beta2=setting.beta2,
            microbatch_sequences=setting.sequences,
        ),
        outer=Outer(
            learning_rate=setting.outer_learning_rate,
            momentum=setting.outer_momentum,
            momentum_warmup_rounds=setting.momentum_warmup_rounds,
        ),
        rounds=Rounds(
            first_tokens_per_round=setting.first_tokens_per_round,
            tokens_per_round=setting.tokens_per_round,
            growth_rounds=setting.growth_rounds,
            wire_codec=setting.wire_codec,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Bytes of the standard library's sources, of files to train on and of files to validate on."""

    training: Tokens
    validation: Tokens
    num_files: int

    @property
    def digest(self) -> str:
        return sha256(self.training.astype(np.uint8).tobytes() + self.validation.astype(np.uint8).tobytes()).hex()

    def batch(self, setting: Setting, seed: int, replica: int, step: int) -> Tokens:
        """What ``replica`` reads at inner ``step``: [B, L+1]."""
        random = np.random.default_rng([seed, replica, step])
        starts = random.integers(0, len(self.training) - setting.length - 1, setting.sequences)
        return _rows(self.training, starts, setting.length)

    def validation_batches(self, setting: Setting, num_sequences: int) -> list[Tokens]:
        """Evenly spread over all validation files; always the same."""
        starts = np.linspace(0, len(self.validation) - setting.length - 2, num_sequences).astype(np.int64)
        rows = _rows(self.validation, starts, setting.length)
        return [rows[first : first + EVALUATION_BATCH] for first in range(0, num_sequences, EVALUATION_BATCH)]

    def plateaus(self) -> dict[str, float]:
        """Validation loss of knowing only how often bytes, and pairs of bytes, come: what a model learns first."""
        pairs = np.ones((VOCAB, VOCAB))  # one of each, so that no pair of the validation files is impossible
        np.add.at(pairs, (self.training[:-1], self.training[1:]), 1)
        singles = pairs.sum(axis=0)
        before, after = self.validation[:-1], self.validation[1:]
        return {
            "bytes": -float(np.log(singles[after] / singles.sum()).mean()),
            "pairs_of_bytes": -float(np.log(pairs[before, after] / pairs[before].sum(axis=1)).mean()),
        }


@functools.cache
def read_text() -> Text:
    """The sources of the running interpreter's standard library, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*.py"))]
    chosen = [path for path in paths if not any(fnmatch(part, no) for part in path.parts[:-1] for no in NOT_TEXT)]
    files = [(folder / path).read_bytes() for path in chosen]
    validation = files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    training = [file for index, file in enumerate(files) if index % VALIDATION_EVERY != VALIDATION_EVERY - 1]
    return Text(training=_tokens(training), validation=_tokens(validation), num_files=len(files))


def _tokens(files: list[bytes]) -> Tokens:
    return np.frombuffer(SEPARATOR.join(files), np.uint8).astype(np.int64)


def _rows(tokens: Tokens, starts: Tokens, length: int) -> Tokens:
    return tokens[starts[:, None] + np.arange(length + 1)]
