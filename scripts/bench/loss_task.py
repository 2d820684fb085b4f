"""What all sides of the race to a loss train: model, text, optimizer, lengths, and the loss that ends it.

Decides them beforehand. All sides are fp32 with AdamW, one thread a peer, and read the same token shards; what differs
is how peers agree. Leaves our own side to `loss_ours`, the rivals to `loss_rivals`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from peer.training.data import ReaderOptions, TokenReader
from peer.training.feeding import VALIDATION_SEQUENCES
from swarm import data_manifest
from swarm.run_file import DataFolder, RunFile, to_spec
from swarm.run_spec import Checkpoints, Inner, Model, Outer, Rounds, RunSpec

CACHE_BYTES = 1 << 30
NO_ROUND_TOKENS = 10**9
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """``target_loss``: nats per token on the run's held-out sequences. ``accumulations``: inner steps of a peer in one
    synchronous step, each with the tokens after which its learning rate has fallen."""

    target_loss: float
    peers: int = 4
    hidden: int = 192
    intermediate: int = 512
    layers: int = 3
    heads: int = 6
    length: int = 128
    sequences: int = 2
    vocab_size: int = 1024
    learning_rate: float = 4e-3
    beta2: float = 0.99
    total_tokens: int = 1_000_000
    warmup_tokens: int = 40_000
    first_tokens_per_round: int = 4_096
    tokens_per_round: int = 24_576
    growth_rounds: int = 30
    wire_codec: str = "int4"
    accumulations: tuple[tuple[int, int], ...] = ((2, 1_000_000), (4, 1_500_000), (8, 2_500_000))
    timed_steps: int = 6
    hivemind_s: float = 120.0
    alone_s: float = 30.0
    max_files: int = 10_000

    @property
    def tokens_per_step(self) -> int:
        """Of all peers in one inner step each."""
        return self.peers * self.sequences * self.length

    def run_file(self, name: str, *, has_rounds: bool = True, ends: bool = True) -> RunFile:
        """What the organizer of our side starts."""
        config = {
            **{"hidden_size": self.hidden, "intermediate_size": self.intermediate, "initializer_range": 0.05},
            **{"num_hidden_layers": self.layers, "num_attention_heads": self.heads},
            "max_position_embeddings": self.length,
        }
        lengths: dict[str, int] = {"tokens_per_round": NO_ROUND_TOKENS}
        if has_rounds:
            lengths = {
                **{"tokens_per_round": self.tokens_per_round, "growth_rounds": self.growth_rounds},
                "first_tokens_per_round": self.first_tokens_per_round,
            }
        return RunFile(
            name=name,
            total_tokens=self.total_tokens if ends else NO_ROUND_TOKENS,
            model=Model(family="llama", config=config),
            data=DataFolder(path="../data", sequence_length=self.length),
            inner=self.inner(),
            outer=Outer(learning_rate=1.0, momentum=0.0),
            rounds=Rounds(**lengths, wire_codec=self.wire_codec, status_interval_s=1.0),  # type: ignore[arg-type]
            checkpoints=Checkpoints(every_rounds=10**6),
        )

    def inner(self) -> Inner:
        return Inner(
            **{"optimizer": "adamw", "weights": "fp32", "microbatch_sequences": self.sequences},
            **{"learning_rate": self.learning_rate, "warmup_tokens": self.warmup_tokens, "beta2": self.beta2},
        )

    def spec(self, data: Path) -> RunSpec:
        """The same rules signed by nobody, for the rivals."""
        manifest = data_manifest.load(data)
        keys = {"organizer_key": bytes(32), "publication_key": b"p" * 32}
        return to_spec(self.run_file("rival"), manifest=manifest, manifest_digest="0" * 64, **keys)


FULL = Task(target_loss=4.0)
QUICK = Task(
    **{"target_loss": 6.9, "peers": 2, "hidden": 32, "intermediate": 64, "layers": 1, "heads": 2, "vocab_size": 512},
    **{"total_tokens": 16_384, "warmup_tokens": 1_000, "tokens_per_round": 4_096, "first_tokens_per_round": 2_048},
    **{
        "growth_rounds": 2,
        "accumulations": ((32, 65_536),),
        "timed_steps": 2,
        "hivemind_s": 10.0,
        "alone_s": 3.0,
        "max_files": 40,
    },
)


class Text:
    """The token shards of a data folder, as the rivals read them."""

    def __init__(self, data: Path, cache: Path, length: int) -> None:
        manifest = data_manifest.load(data)
        files = {shard.digest: data / shard.file for shard in (*manifest.train, *manifest.validation)}

        async def fetch(digest: bytes, size_bytes: int) -> bytes:
            return files[digest.hex()].read_bytes()

        options = ReaderOptions(sequence_length=length, cache=cache, max_cache_bytes=CACHE_BYTES)
        reader = TokenReader(manifest, options, fetch)
        asyncio.run(reader.ensure_validation(VALIDATION_SEQUENCES))
        self.validation = list(reader.validation_batches(VALIDATION_SEQUENCES, VALIDATION_SEQUENCES))
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[manifest.dtype])
        self._train = np.concatenate([np.fromfile(data / shard.file, dtype) for shard in manifest.train])
        self._length = length

    def batch(self, random: np.random.Generator, sequences: int) -> Tokens:
        """[sequences, L+1], anywhere in the text."""
        starts = random.integers(0, len(self._train) - self._length, sequences)
        return self._train[starts[:, None] + np.arange(self._length + 1)].astype(np.int64)
