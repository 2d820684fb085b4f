"""What a peer trains on and validates with: token shards, fetched when needed, verified, cached, read as arrays.

Decides what lies in the cache and how tokens become batches. Leaves which sequences a step reads to
`swarm.assignment`, and who has a token shard to the ``fetch`` that it is given.

L is the sequence length of the run: sequence i of a token shard is its tokens [i*L, i*L + L + 1), input and target.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarm import digest
from swarm.assignment import Reading
from swarm.data_manifest import DataManifest, TokenShard
from swarm.errors import DataError, DigestError, DiskFull
from swarm.files import disk_errors, write_durably

logger = logging.getLogger(__name__)

# A large run has thousands of validation shards: this many, evenly spaced, stand for all of them.
MAX_VALIDATION_SHARDS = 8
# Training shards kept open: the one being read, and the next round's.
_OPEN_TRAIN_SHARDS = 3
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}

Fetch = Callable[[bytes, int], Awaitable[bytes]]
"""(SHA-256, bytes to expect) -> the bytes. Brings its own deadline; raises `NetworkError`."""


def sequences_in(num_tokens: int, sequence_length: int) -> int:
    """Sequences in a token shard: each needs its own L tokens and one more as the last target."""
    return max(0, (num_tokens - 1) // sequence_length)


def validation_readings(shard_sequences: Sequence[int], max_sequences: int) -> list[Reading]:
    """At most ``max_sequences`` sequences, evenly spread over at most `MAX_VALIDATION_SHARDS` token shards."""
    usable = [index for index, count in enumerate(shard_sequences) if count > 0]
    num_shards = min(len(usable), MAX_VALIDATION_SHARDS, max_sequences)
    chosen = [usable[position * len(usable) // num_shards] for position in range(num_shards)]
    total = sum(shard_sequences[index] for index in chosen)
    wanted = min(total, max_sequences)
    positions = [position * total // wanted for position in range(wanted)]
    found, start = [], 0
    for index in chosen:
        end = start + shard_sequences[index]
        here = tuple(position - start for position in positions if start <= position < end)
        found += [Reading(token_shard=index, sequences=here)] if here else []
        start = end
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderOptions:
    """``cache``: a folder of this reader's own. ``max_cache_bytes``: bound on the files in it."""

    sequence_length: int
    cache: Path
    max_cache_bytes: int


class TokenReader:
    """Batches of the run's tokens. One event loop uses it; `ensure` a token shard before reading from it."""

    def __init__(self, manifest: DataManifest, options: ReaderOptions, fetch: Fetch) -> None:
        """Raises `DataError` where no train or no validation token shard holds a whole sequence."""
        self._manifest, self._options, self._fetch = manifest, options, fetch
        length = options.sequence_length
        self._train = [sequences_in(shard.num_tokens, length) for shard in manifest.train]
        self._validation = [sequences_in(shard.num_tokens, length) for shard in manifest.validation]
        for split, counts in (("train", self._train), ("validation", self._validation)):
            if not any(counts):
                advice = "use a shorter sequence_length, larger token shards or more text"
                raise DataError(f"no {split} token shard holds a sequence of {length} tokens", advice)
        self._open: OrderedDict[bytes, npt.NDArray[Any]] = OrderedDict()
        self._pinned: dict[bytes, npt.NDArray[Any]] = {}
        self._one_at_a_time = asyncio.Lock()
        options.cache.mkdir(parents=True, exist_ok=True)
        for leftover in options.cache.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)

    @property
    def manifest(self) -> DataManifest:
        return self._manifest

    def sequences_per_shard(self) -> list[int]:
        """Sequences in every train token shard, in the manifest's order: what `swarm.assignment` asks for."""
        return list(self._train)

    async def ensure(self, token_shard: int) -> None:
        """Make train token shard ``token_shard`` readable, from the cache or by ``fetch``; the last two stay readable.

        Raises `DigestError` (the bytes are not the shard: ask another peer), `DiskFull`, or what ``fetch`` raises.
        """
        shard = self._shard(self._manifest.train, token_shard)
        key = bytes.fromhex(shard.digest)
        async with self._one_at_a_time:
            if key not in self._open:
                self._open[key] = await self._obtain(shard)
            self._open.move_to_end(key)
            while len(self._open) > _OPEN_TRAIN_SHARDS:
                self._open.popitem(last=False)

    async def ensure_validation(self, max_sequences: int) -> None:
        """Make what `validation_batches` of this ``max_sequences`` reads readable, for good. Raises as `ensure`."""
        async with self._one_at_a_time:
            for reading in validation_readings(self._validation, max_sequences):
                shard = self._manifest.validation[reading.token_shard]
                key = bytes.fromhex(shard.digest)
                if key not in self._pinned:
                    self._pinned[key] = await self._obtain(shard)

    def batch(self, reading: Reading) -> npt.NDArray[np.int64]:
        """Token ids [sequences, L + 1] of train sequences. Raises `DataError` where the shard was not ensured."""
        return self._gather(self._shard(self._manifest.train, reading.token_shard), self._open, reading)

    def validation_batches(self, max_sequences: int, batch: int) -> Iterator[npt.NDArray[np.int64]]:
        """Token ids [up to ``batch``, L + 1] of at most ``max_sequences`` held-out sequences; always the same ones."""
        readings = validation_readings(self._validation, max_sequences)
        places = [(reading.token_shard, sequence) for reading in readings for sequence in reading.sequences]
        for start in range(0, len(places), batch):
            rows = []
            for index, group in itertools.groupby(places[start : start + batch], key=lambda place: place[0]):
                part = Reading(token_shard=index, sequences=tuple(sequence for _, sequence in group))
                rows.append(self._gather(self._manifest.validation[index], self._pinned, part))
            yield np.concatenate(rows)

    def _shard(self, shards: Sequence[TokenShard], index: int) -> TokenShard:
        if not 0 <= index < len(shards):
            raise DataError(f"there is no token shard {index}, only {len(shards)}")
        return shards[index]

    def _gather(
        self, shard: TokenShard, readable: dict[bytes, npt.NDArray[Any]], reading: Reading
    ) -> npt.NDArray[np.int64]:
        tokens = readable.get(bytes.fromhex(shard.digest))
        if tokens is None:
            raise DataError(f"{shard.file} is read before it was fetched")
        length = self._options.sequence_length
        first = np.asarray(reading.sequences, np.int64)
        if first.size and not 0 <= first.min() <= first.max() < sequences_in(shard.num_tokens, length):
            raise DataError(f"{shard.file} has no sequence {int(first.max())}")
        ids = np.asarray(tokens[first[:, None] * length + np.arange(length + 1)], np.int64)
        if ids.size and ids.max() >= self._manifest.vocab_size:
            raise DataError(f"{shard.file} holds token {int(ids.max())}, beyond the vocabulary")
        return ids

    async def _obtain(self, shard: TokenShard) -> npt.NDArray[Any]:
        path = self._path(shard)
        if not await asyncio.to_thread(self._is_cached, shard):
            data = await self._fetch(bytes.fromhex(shard.digest), self._manifest.size_bytes(shard))
            await asyncio.to_thread(self._store, shard, data)
        os.utime(path)
        dtype = np.dtype(_DTYPES[self._manifest.dtype])
        # Mapped, not loaded; what is evicted from the cache stays readable (and on disk) while it is mapped.
        return np.memmap(path, dtype=dtype, mode="r", shape=(shard.num_tokens,))

    def _path(self, shard: TokenShard) -> Path:
        return self._options.cache / f"{shard.digest}.bin"

    def _is_cached(self, shard: TokenShard) -> bool:
        path = self._path(shard)
        try:
            if path.stat().st_size == self._manifest.size_bytes(shard):
                digest.check(path.read_bytes(), bytes.fromhex(shard.digest), shard.file)
                return True
        except (FileNotFoundError, DigestError):
            pass
        path.unlink(missing_ok=True)  # damaged on disk: fetched again
        return False

    def _store(self, shard: TokenShard, data: bytes) -> None:
        digest.check(data, bytes.fromhex(shard.digest), shard.file)
        self._make_room(len(data))
        write_durably(self._path(shard), data)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until ``size`` bytes fit; never those that are pinned."""
        with disk_errors(self._options.cache):
            found = [(path, path.stat()) for path in self._options.cache.glob("*.bin")]
        used = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda item: (item[1].st_mtime_ns, item[0].name)):
            if used + size <= self._options.max_cache_bytes:
                return
            if not any(path == self._options.cache / f"{key.hex()}.bin" for key in self._pinned):
                path.unlink(missing_ok=True)
                used -= status.st_size
        limit = self._options.max_cache_bytes
        if used + size > limit:
            raise DiskFull(
                f"a token shard of {size} bytes does not fit into the data cache of {limit} bytes"
                + (f", of which validation needs {used}" if used else ""),
                "allow the data cache more space",
            )
