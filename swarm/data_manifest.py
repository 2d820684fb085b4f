"""The data manifest: what a run trains on, by digest.

Decides the manifest's form and its limits; leaves writing token shards to `coordinator.data_prepare` and reading them
to `peer.data`. A token shard is a file of little-endian token ids (``dtype``), no header.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from swarm.digest import sha256
from swarm.errors import DataError, DigestError, SpecError
from swarm.run_spec import Hex32, Section, parse_section

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_TOKEN_SHARD_BYTES = 64 << 20

Text = Annotated[str, StringConstraints(max_length=4096)]


class TokenShard(Section):
    """One file of tokens; ``file`` is ``train-00000.bin`` or ``validation-00000.bin``."""

    file: str = Field(pattern=r"^(train|validation)-[0-9]{5,9}\.bin$")
    digest: Hex32
    num_tokens: int = Field(ge=1, le=MAX_TOKEN_SHARD_BYTES // 2)


class Source(Section):
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

    def canonical_bytes(self) -> bytes:
        """Sorted, indented JSON: the bytes of ``manifest.json``."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()

    @property
    def train_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.train)


def parse(raw: bytes, digest_hex: str | None = None) -> DataManifest:
    """Read a manifest; where ``digest_hex`` is given, the bytes must have this SHA-256."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise DataError(f"the data manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    if digest_hex is not None and sha256(raw).hex() != digest_hex:
        raise DigestError("the data manifest is not the one that the run spec names")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError("the data manifest is not JSON") from error
    try:
        manifest: DataManifest = parse_section(DataManifest, values, "data manifest")
    except SpecError as error:
        raise DataError(str(error)) from error
    return manifest
