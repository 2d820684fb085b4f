"""From documents to what a run trains on: a tokenizer, token shards and the data manifest.

Decides which documents are held out and what a tokenizer learns from. Leaves reading documents to
`coordinator.data_sources`, the layout of tokens to `coordinator.token_shards`, folders and disks to
`coordinator.data_folder`, the manifest's form to `swarm.data_manifest`. Same input, same output, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator import data_sources, tokenizer
from coordinator.data_folder import check_replaceable, opened_durably, resolved, staged, staging_folder, write_durably
from coordinator.data_sources import Selection, Tally
from coordinator.document_index import IndexWriter
from coordinator.token_shards import TokenShardWriter
from swarm.data_manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MAX_TOKEN_SHARD_BYTES,
    TOKENIZER_NAME,
    DataManifest,
    Source,
)
from swarm.digest import sha256
from swarm.errors import ConfigError, DataError
from swarm.files import file_sha256

MAX_TRAINING_BYTES = 100_000_000  # of text that a new tokenizer learns from
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """``validation_fraction``: share of documents held out. ``include``: names that count inside folders."""

    sources: tuple[Path, ...]
    out: Path
    tokenizer: Path | None = None
    vocab_size: int = 8192
    validation_fraction: float = 0.01
    licence: str = "unknown"
    token_shard_tokens: int = 1 << 20
    include: tuple[str, ...] = data_sources.DEFAULT_INCLUDE
    strict: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no source is named", "name a text file, a folder, a .jsonl, .jsonl.zst or .parquet file")
        if not tokenizer.MIN_VOCAB_SIZE <= self.vocab_size <= 1 << 20:
            raise ConfigError(f"vocab size: from {tokenizer.MIN_VOCAB_SIZE} to {1 << 20}, not {self.vocab_size}")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation fraction: between 0 and 1, not {self.validation_fraction}")
        most = MAX_TOKEN_SHARD_BYTES // 4
        if not 64 <= self.token_shard_tokens <= most:
            raise ConfigError(f"token shard tokens: from 64 to {most}, not {self.token_shard_tokens}")
        if len(self.licence) > 4096:
            raise ConfigError("licence: at most 4096 characters")

    @property
    def selection(self) -> Selection:
        out = resolved(self.out)
        return Selection(include=self.include, exclude=(out, staging_folder(out)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where preparing stands. ``phase``: "train tokenizer" or "tokenize"; ``examples``: first malformed documents."""

    phase: str
    bytes_done: int
    bytes_total: int
    documents: int = 0
    tokens: int = 0
    malformed: int = 0
    examples: tuple[str, ...] = ()


def prepare(options: PrepareOptions, progress: Callable[[Progress], None]) -> DataManifest:
    """Write the folder ``options.out`` and return its manifest; ``progress`` is called after every batch.

    Raises `DataError` (a source is missing or holds no documents, a split stays empty, a malformed document where
    ``strict``), `ConfigError` (the folder exists), `AlreadyRunning`, `DiskFull`. After an error nothing is left.
    """
    for source in options.sources:
        if not source.exists():
            raise DataError(f"{source} does not exist", "name a file or folder that is there")
    out = resolved(options.out)
    check_replaceable(out, options.force)
    with staged(out) as folder:
        bytes_total = sum(data_sources.size_bytes(source, options.selection) for source in options.sources)
        if options.tokenizer is None:
            chosen = tokenizer.train(_training_texts(options, bytes_total, progress), options.vocab_size)
        else:
            chosen = tokenizer.load(options.tokenizer)
        with opened_durably(folder / INDEX_NAME) as index:
            writing = _Writing(options, chosen, folder, IndexWriter(index))
            writing.run(bytes_total, progress)
        manifest = writing.manifest(file_sha256(folder / INDEX_NAME))
        raw = manifest.canonical_bytes()
        if len(raw) > MAX_MANIFEST_BYTES:
            raise DataError("the manifest would be too large", "use a larger --token-shard-tokens")
        write_durably(folder / TOKENIZER_NAME, chosen.raw)
        write_durably(folder / MANIFEST_NAME, raw)
    return manifest


def document_hash(text: str) -> bytes:
    """SHA-256 of the document's UTF-8 text: what decides its split, so duplicates are never on both sides."""
    return hashlib.sha256(text.encode()).digest()


def is_validation(digest: bytes, fraction: float) -> bool:
    """Whether a document with this hash is held out: its first 8 bytes / 2^64 are below ``fraction``."""
    return int.from_bytes(digest[:8], "big") < int(fraction * 2**64)


@dataclass(slots=True)
class _SourceRecord:
    path: Path
    documents: int = 0
    text_bytes: int = 0
    malformed: int = 0
    hash: Any = field(default_factory=hashlib.sha256)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of a document; ``document``: its hash; ``ends``: the document's last piece."""

    split: str
    document: bytes
    text: str
    ends: bool


class _Writing:
    """The pass over all documents that writes token shards."""

    def __init__(self, options: PrepareOptions, chosen: tokenizer.Tokenizer, folder: Path, index: IndexWriter) -> None:
        self._options, self._tokenizer = options, chosen
        self._dtype = "uint16" if chosen.vocab_size <= 65536 else "uint32"
        self._writers = {
            split: TokenShardWriter(folder, split, self._dtype, options.token_shard_tokens, index.add)
            for split in ("train", "validation")
        }
        self._records: list[_SourceRecord] = []
        self._tally = Tally(options.strict)
        self._documents = {"train": 0, "validation": 0}
        self._tokens = 0
        self._extremes = (2**64, 0)  # smallest and largest of the documents' first 8 hash bytes

    def run(self, bytes_total: int, progress: Callable[[Progress], None]) -> None:
        for batch in _batches(self._pieces()):
            for piece, ids in zip(batch, self._tokenizer.encode([piece.text for piece in batch]), strict=True):
                writer = self._writers[piece.split]
                writer.append(ids)
                self._tokens += len(ids) + piece.ends
                if piece.ends:
                    writer.append([self._tokenizer.end_of_text_id])
                    writer.end_document(piece.document)
            progress(self._progress(bytes_total))
        for writer in self._writers.values():
            writer.close()
        self._check_splits()
        progress(self._progress(bytes_total))

    def manifest(self, documents_digest: str) -> DataManifest:
        limit = data_sources.MAX_PIECE_CHARACTERS
        return DataManifest(
            tokenizer_digest=sha256(self._tokenizer.raw).hex(),
            vocab_size=self._tokenizer.vocab_size,
            end_of_text_id=self._tokenizer.end_of_text_id,
            dtype="uint16" if self._dtype == "uint16" else "uint32",
            train=tuple(self._writers["train"].shards),
            validation=tuple(self._writers["validation"].shards),
            sources=tuple(self._source(record) for record in self._records),
            documents_digest=documents_digest,
            filters=(
                f"of folders: files named {', '.join(self._options.include)}; no hidden files, no symlinks"[:4096],
                "left out: malformed documents, documents of white space only",
                f"text files are cut at line ends into documents of at most {limit} characters",
                "documents are mixed within windows of the token stream, ordered by their SHA-256",
            ),
        )

    def _source(self, record: _SourceRecord) -> Source:
        return Source(
            path=os.fsencode(record.path).decode(errors="replace"),
            licence=self._options.licence,
            digest=record.hash.hexdigest(),
            documents=record.documents,
            text_bytes=record.text_bytes,
            malformed=record.malformed,
        )

    def _pieces(self) -> Iterator[_Piece]:
        for source in self._options.sources:
            record, before = _SourceRecord(source), self._tally.malformed
            for text in data_sources.documents(source, self._options.selection, self._tally):
                document = document_hash(text)
                split = self._place(document, len(text.encode()), record)
                *whole, last = data_sources.cut(text)
                yield from (_Piece(split, document, piece, False) for piece in whole)
                yield _Piece(split, document, last, True)
            record.malformed = self._tally.malformed - before
            self._records.append(record)
            self._check_source(record)

    def _place(self, digest: bytes, text_bytes: int, record: _SourceRecord) -> str:
        record.hash.update(digest)
        record.documents += 1
        record.text_bytes += text_bytes
        value = int.from_bytes(digest[:8], "big")
        self._extremes = (min(value, self._extremes[0]), max(value, self._extremes[1]))
        split = "validation" if is_validation(digest, self._options.validation_fraction) else "train"
        self._documents[split] += 1
        return split

    def _check_source(self, record: _SourceRecord) -> None:
        if not record.documents:
            seen = f" ({record.malformed} malformed; {self._tally.examples[0]})" if record.malformed else ""
            raise DataError(
                f"{record.path} holds no documents{seen}",
                "name text, .jsonl, .jsonl.zst or .parquet files, or widen --include",
            )

    def _check_splits(self) -> None:
        total = sum(self._documents.values())
        smallest, largest = self._extremes
        if smallest == largest:
            raise DataError(
                "there is only one document, and validation needs another",
                "add text: a run needs at least one document to train on and one to validate on",
            )
        if not self._documents["validation"]:
            advice = f"use --validation-fraction {_above(smallest)} or more, or add text"
            raise DataError(f"none of the {total} documents falls into the validation split", advice)
        if not self._documents["train"]:
            advice = f"use --validation-fraction {_below(largest)} or less, or add text"
            raise DataError(f"all of the {total} documents fall into the validation split", advice)

    def _progress(self, bytes_total: int) -> Progress:
        return Progress(
            phase="tokenize",
            bytes_done=min(self._tally.bytes_read, bytes_total),
            bytes_total=bytes_total,
            documents=sum(self._documents.values()),
            tokens=self._tokens,
            malformed=self._tally.malformed,
            examples=tuple(self._tally.examples),
        )


def _above(value: int) -> float:
    """The share with at most 4 decimals that holds out a document with this hash, or nearly 1."""
    return min(0.9999, (int(value / 2**64 * 10000) + 1) / 10000)


def _below(value: int) -> float:
    return max(0.0001, int(value / 2**64 * 10000) / 10000)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        # Very short documents cost memory too: 64 characters stand for what surrounds each.
        held += len(piece.text) + 64
        if held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _training_texts(options: PrepareOptions, bytes_total: int, progress: Callable[[Progress], None]) -> Iterator[str]:
    """Train documents in pieces, at most `MAX_TRAINING_BYTES`; every source gets an equal share of what is left."""
    left = MAX_TRAINING_BYTES
    tally = Tally(options.strict)
    for index, source in enumerate(options.sources):
        share = left // (len(options.sources) - index)
        for text in data_sources.documents(source, options.selection, tally):
            if is_validation(document_hash(text), options.validation_fraction):
                continue
            for piece in data_sources.cut(text):
                share, left = share - len(piece.encode()), left - len(piece.encode())
                yield piece
            progress(Progress(phase="train tokenizer", bytes_done=tally.bytes_read, bytes_total=bytes_total))
            if share <= 0:
                break
