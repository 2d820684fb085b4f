"""Laying out tokens in files: documents mixed, then cut into token shards of one size.

Decides the order of documents within a split and where one file ends. A peer reads one token shard per round, so a
token shard should look like the whole: documents wait in a window of `WINDOW_TOKENS` and leave it in the order of
their hashes. Memory is bounded by one window and one token shard. Leaves tokens to `coordinator.tokenizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.data_folder import write_durably
from swarm.data_manifest import TokenShard, token_shard_name
from swarm.digest import sha256

WINDOW_TOKENS = 1 << 24
# What an array costs besides its tokens, in tokens: bounds a window of very short documents.
_DOCUMENT_OVERHEAD_TOKENS = 64


OnDocument = Callable[[str, bytes, int, int], object]
"""(split, hash of the document, its first token in the split's stream, its tokens)"""


class TokenShardWriter:
    """Writes one split into files of ``tokens_per_shard`` little-endian tokens each (the last may be shorter)."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        tokens_per_shard: int,
        on_document: OnDocument = lambda split, order, start, num_tokens: None,
    ) -> None:
        """``on_document`` is told of every document, in the order of the stream."""
        self._folder, self._split, self._on_document = folder, split, on_document
        self._written = 0
        self._buffer = np.empty(tokens_per_shard, np.dtype(dtype).newbyteorder("<"))
        self._held = 0
        self._document: list[npt.NDArray[Any]] = []
        self._window: list[tuple[bytes, npt.NDArray[Any]]] = []
        self._window_tokens = 0
        self.shards: list[TokenShard] = []

    def append(self, ids: Sequence[int]) -> None:
        """More tokens of the current document."""
        self._document.append(np.asarray(ids, self._buffer.dtype))

    def end_document(self, order: bytes) -> None:
        """The current document is complete; ``order`` (its hash) decides its place in the window."""
        tokens = np.concatenate(self._document)
        self._document = []
        self._window.append((order, tokens))
        self._window_tokens += len(tokens) + _DOCUMENT_OVERHEAD_TOKENS
        if self._window_tokens >= WINDOW_TOKENS:
            self._empty_window()

    def close(self) -> None:
        """Write what still waits. Raises `DiskFull`, as does every write before."""
        self._empty_window()
        if self._held:
            self._write()

    def _empty_window(self) -> None:
        for order, tokens in sorted(self._window, key=itemgetter(0)):
            self._on_document(self._split, order, self._written, len(tokens))
            self._written += len(tokens)
            self._fill(tokens)
        self._window, self._window_tokens = [], 0

    def _fill(self, tokens: npt.NDArray[Any]) -> None:
        while len(tokens):
            room = len(self._buffer) - self._held
            taken, tokens = tokens[:room], tokens[room:]
            self._buffer[self._held : self._held + len(taken)] = taken
            self._held += len(taken)
            if self._held == len(self._buffer):
                self._write()

    def _write(self) -> None:
        data = self._buffer[: self._held].tobytes()
        name = token_shard_name(self._split, len(self.shards))
        write_durably(self._folder / name, data)
        self.shards.append(TokenShard(file=name, digest=sha256(data).hex(), num_tokens=self._held))
        self._held = 0
