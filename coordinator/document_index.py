"""Where each document lies in the token shards: written when data is prepared, looked up by digest.

Decides the file's form: one record a document, in the order of the token stream: SHA-256 of its UTF-8 text, split (0
train, 1 validation), first token over all token shards of the split, tokens with the end-of-text one. The data manifest
holds its digest. A lookup reads the file once, without loading it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from swarm.data_manifest import INDEX_NAME, DataManifest
from swarm.errors import DataError

SPLITS = ("train", "validation")
_RECORD = struct.Struct("<32sBQQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A document in the token stream of its split."""

    digest: bytes
    split: str
    start: int
    num_tokens: int

    def files(self, manifest: DataManifest) -> list[str]:
        """The token shards that hold it."""
        shards = manifest.train if self.split == "train" else manifest.validation
        found, first = [], 0
        for shard in shards:
            if first < self.start + self.num_tokens and self.start < first + shard.num_tokens:
                found.append(shard.file)
            first += shard.num_tokens
        return found


class IndexWriter:
    """Appends to an open file; documents may come in any order of splits."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, split: str, digest: bytes, start: int, num_tokens: int) -> None:
        self._file.write(_RECORD.pack(digest, SPLITS.index(split), start, num_tokens))


def find(folder: Path, digest: bytes) -> list[Place]:
    """Every place of the document with this SHA-256; a document that a source repeats has several.

    Raises `DataError` where the folder has no index, or a damaged one.
    """
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size % _RECORD.size:
                raise DataError(f"{path} is cut short", "check the folder: swarm data verify")
            if not size:
                return []
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return list(_matches(mapped, digest))
    except OSError as error:
        advice = "prepare the data again: this folder was made by an older version"
        raise DataError(f"cannot read {path}: {error.strerror}", advice) from error


def _matches(mapped: mmap.mmap, digest: bytes) -> Iterator[Place]:
    at = mapped.find(digest)
    while at >= 0:
        if at % _RECORD.size == 0:
            _, split, start, num_tokens = _RECORD.unpack_from(mapped, at)
            if split >= len(SPLITS):
                raise DataError("the index of documents is damaged", "check the folder: swarm data verify")
            yield Place(digest=digest, split=SPLITS[split], start=start, num_tokens=num_tokens)
        at = mapped.find(digest, at + 1)
