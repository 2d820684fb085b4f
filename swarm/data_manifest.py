"""The data manifest: what a run trains on, by digest.

Decides the manifest's form and its limits; leaves writing token shards to `coordinator.data_prepare` and reading them
to `peer.training.data`. A token shard is a file of little-endian token ids (``dtype``), no header. A prepared folder
holds the token shards, ``tokenizer.json``, ``documents.idx`` and ``manifest.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from swarm.digest import sha256
from swarm.errors import DataError, DigestError, SpecError
from swarm.run_spec import Hex32, Section, parse_section

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
INDEX_NAME = "documents.idx"
MAX_MANIFEST_BYTES = 64 << 20
MAX_TOKEN_SHARD_BYTES = 64 << 20

Text = Annotated[str, StringConstraints(max_length=4096)]


class TokenShard(Section):
    """One file of tokens; ``file`` is ``train-00000.bin`` or ``validation-00000.bin``."""

    file: str = Field(pattern=r"^(train|validation)-[0-9]{5,9}\.bin$")
    digest: Hex32
    num_tokens: int = Field(ge=1, le=MAX_TOKEN_SHARD_BYTES // 2)


class Source(Section):
    """Where documents came from; ``digest`` is SHA-256 over the SHA-256 of every document's UTF-8 text, in order."""

    path: Text
    licence: Text = "unknown"
    digest: Hex32
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    malformed: int = Field(0, ge=0)


class DataManifest(Section):
    format: Literal[1] = 1
    tokenizer_digest: Hex32
    vocab_size: int = Field(ge=2, le=2**31 - 1)
    end_of_text_id: int = Field(ge=0)
    dtype: Literal["uint16", "uint32"]
    train: tuple[TokenShard, ...] = Field(min_length=1, max_length=1_000_000)
    validation: tuple[TokenShard, ...] = Field(min_length=1, max_length=1_000_000)
    sources: tuple[Source, ...] = Field(max_length=1_000_000)
    filters: tuple[Text, ...] = ()
    documents_digest: Hex32 | None = None
    """SHA-256 of ``documents.idx``, which says where each document lies; None in data of older versions"""

    @model_validator(mode="after")
    def _holds_together(self) -> DataManifest:
        if self.dtype == "uint16" and self.vocab_size > 65536:
            raise ValueError(f"vocab_size: {self.vocab_size} ids do not fit in uint16")
        if self.end_of_text_id >= self.vocab_size:
            raise ValueError(f"end_of_text_id: {self.end_of_text_id} is not below vocab_size {self.vocab_size}")
        for split, shards in (("train", self.train), ("validation", self.validation)):
            for index, shard in enumerate(shards):
                if shard.file != token_shard_name(split, index):
                    raise ValueError(f"{split}: file {index} is {shard.file}, not {token_shard_name(split, index)}")
                if self.size_bytes(shard) > MAX_TOKEN_SHARD_BYTES:
                    raise ValueError(f"{shard.file} is larger than {MAX_TOKEN_SHARD_BYTES} bytes")
        return self

    @property
    def token_bytes(self) -> int:
        """Bytes of one token id in a token shard."""
        return 2 if self.dtype == "uint16" else 4

    def size_bytes(self, shard: TokenShard) -> int:
        """Bytes of the token shard's file."""
        return shard.num_tokens * self.token_bytes

    def canonical_bytes(self) -> bytes:
        """Sorted, indented JSON: the bytes of ``manifest.json``."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()

    @property
    def train_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.train)

    @property
    def validation_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.validation)


def token_shard_name(split: str, index: int) -> str:
    """The file of token shard ``index`` (from 0) of ``split`` (``train`` or ``validation``)."""
    return f"{split}-{index:05d}.bin"


def parse(raw: bytes, digest_hex: str | None = None) -> DataManifest:
    """Read a manifest; where ``digest_hex`` is given, the bytes must have this SHA-256."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise DataError(f"the data manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    if digest_hex is not None and sha256(raw).hex() != digest_hex:
        raise DigestError(f"the data manifest does not have the digest {digest_hex[:80]}")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError("the data manifest is not JSON") from error
    try:
        manifest: DataManifest = parse_section(DataManifest, values, "data manifest")
    except SpecError as error:
        raise DataError(str(error)) from error
    return manifest


def load(folder: Path, digest_hex: str | None = None) -> DataManifest:
    """The manifest of a prepared folder. Raises `DataError` where there is none, else as `parse`."""
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        advice = "name a folder that `swarm data prepare` wrote"
        raise DataError(f"cannot read {path}: {error.strerror}", advice) from error
    return parse(raw, digest_hex)
