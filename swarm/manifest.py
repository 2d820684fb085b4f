"""The checkpoint manifest: the signed list of a checkpoint's files.

Decides which files a checkpoint may hold and what is checked, without any I/O: bytes in, verified objects out, or a
named error. A checkpoint on disk is the files of the manifest plus ``swarm-manifest.json`` (the payload as signed)
and ``swarm-manifest.sig`` (serialised `Signed`, context "checkpoint"). Who witnessed the state is `swarm.witness`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from swarm.digest import over_shards, sha256
from swarm.errors import DataError, RefusedCheckpoint, SignatureError, SpecError
from swarm.identity import verify
from swarm.proto.common_pb2 import Signed
from swarm.run_spec import Hex32, Section, parse_section

CONTEXT = "checkpoint"
FILE_CHUNK_BYTES = 4 << 20
MANIFEST_FILE = "swarm-manifest.json"
SIGNATURE_FILE = "swarm-manifest.sig"
SPEC_FILE = "swarm-run-spec.sig"
DATA_FILE = "data-manifest.json"
CONFIG_NAME = "config.json"
WITNESSES_FILE = "swarm-witnesses.sig"
ROOTS_FILE = "swarm-roots.sig"  # only where the organizers changed the run's keys
SIGNED_FILES = frozenset({MANIFEST_FILE, SIGNATURE_FILE, SPEC_FILE, WITNESSES_FILE, ROOTS_FILE})
"""what lies beside the files of the manifest, checked by signatures"""
MAX_MANIFEST_BYTES = 64 << 20
MAX_FILES = 10_000
MAX_PARAMETERS = 1 << 20
VALUE_BYTES = 4  # the anchor is fp32
MAX_SHARDS = 1024
FP32, BF16 = "fp32", "bf16"
"""the sets of files in which a checkpoint comes"""

# One plain name: no folders, no leading dot, nothing that differs only by case on some file systems. Only kinds of file
# that hold no code: no pickle (.bin, .pt), no Python, no templates. README.md is the one name with capitals.
FileName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,115}\.(json|safetensors|txt)$|^README\.md$")
]
RunIdHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]


class CheckpointFile(Section):
    name: FileName
    size_bytes: int = Field(ge=0, le=1 << 44)
    sha256: Hex32
    chunks: tuple[Hex32, ...] = Field(max_length=1 << 22)

    @model_validator(mode="after")
    def _chunk_count(self) -> CheckpointFile:
        if len(self.chunks) != -(-self.size_bytes // FILE_CHUNK_BYTES):
            raise ValueError(f"{self.name}: {len(self.chunks)} chunks do not make {self.size_bytes} bytes")
        return self


class Parameter(Section):
    name: str = Field(min_length=1, max_length=256)
    shape: tuple[Annotated[int, Field(ge=0, le=1 << 40)], ...] = Field(max_length=16)

    @property
    def size_bytes(self) -> int:
        return VALUE_BYTES * math.prod(self.shape)


class Anchor(Section):
    """The state whose weights these are: what witnesses signed, and how to recompute it from the files.

    ``digest``: Merkle root over the chunks of all parameters, one after the other in this order, little-endian fp32.
    Of several shards, ``digest`` and ``momentum_digest`` are over those of each.
    """

    digest: Hex32
    momentum_digest: Hex32
    parameters: tuple[Parameter, ...] = Field(min_length=1, max_length=MAX_PARAMETERS)

    @model_validator(mode="after")
    def _distinct_parameters(self) -> Anchor:
        if len({parameter.name for parameter in self.parameters}) != len(self.parameters):
            raise ValueError("two parameters have one name")
        return self

    @property
    def num_values(self) -> int:
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    @property
    def layout_digest(self) -> bytes:
        """SHA-256 over names and shapes, in order: the same bytes under other names are another model."""
        layout = [[parameter.name, list(parameter.shape)] for parameter in self.parameters]
        return sha256(json.dumps(layout, separators=(",", ":")).encode())


class ShardState(Section):
    """Where a shard stood after the checkpoint's round.

    ``num_values``: how many of the anchor's are its own; shards lie in the anchor one after the other.
    """

    state_digest: Hex32
    log_digest: Hex32
    anchor_digest: Hex32
    momentum_digest: Hex32
    num_values: int = Field(ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSet:
    """One of the sets in which a checkpoint comes: a folder in Hugging Face layout by itself.

    ``derived``: names of those that are this set's own, where it is not the fp32 set.
    """

    dtype: str
    files: tuple[CheckpointFile, ...]
    derived: frozenset[str] = frozenset()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def place(self, name: str) -> str:
        """Where a file lies that is published with other sets together."""
        return f"{self.dtype}/{name}" if name in self.derived else name


class CheckpointManifest(Section):
    """``shards``: of each, where a run has more than one; ``state_digest`` and ``log_digest`` are over all of them.

    ``total_tokens`` are those of the first shard's log. ``files`` are the fp32 set; ``bf16`` are those that are in
    their place in the bf16 set (`swarm.derived`), none in what was published before there was one.
    """

    format: Literal[2] = 2
    run_id: RunIdHex
    run_name: str = Field(max_length=64)
    round: int = Field(ge=1)
    total_tokens: int = Field(ge=0)
    state_digest: Hex32
    log_digest: Hex32
    shards: tuple[ShardState, ...] = Field((), max_length=MAX_SHARDS)
    data_manifest_digest: Hex32
    anchor: Anchor
    files: tuple[CheckpointFile, ...] = Field(min_length=1, max_length=MAX_FILES)
    bf16: tuple[CheckpointFile, ...] = Field((), max_length=MAX_FILES)

    @model_validator(mode="after")
    def _names_of_the_bf16_set(self) -> CheckpointManifest:
        if self.bf16 and tuple(file.name for file in self.bf16) != derived_names(file.name for file in self.files):
            raise ValueError("bf16: not the files that a bf16 set has of its own")
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> CheckpointManifest:
        if len({file.name.lower() for file in self.files}) != len(self.files):
            raise ValueError("two files have one name")
        if any(file.name in SIGNED_FILES for file in self.files):
            raise ValueError("a file has the name of the manifest")
        return self

    @model_validator(mode="after")
    def _digests_of_shards(self) -> CheckpointManifest:
        if len(self.shards) == 1:
            raise ValueError("shards: one shard is the run's, and is not listed")
        whole = {
            "state_digest": self.state_digest,
            "log_digest": self.log_digest,
            "anchor_digest": self.anchor.digest,
            "momentum_digest": self.anchor.momentum_digest,
        }
        for name, expected in whole.items() if self.shards else ():
            if over_shards([bytes.fromhex(getattr(shard, name)) for shard in self.shards]).hex() != expected:
                raise ValueError(f"{name} is not that of the shards")
        if self.shards and sum(shard.num_values for shard in self.shards) != self.anchor.num_values:
            raise ValueError("the shards are not the anchor")
        return self

    @property
    def states(self) -> tuple[ShardState, ...]:
        """Of every shard, in order."""
        only = ShardState(
            state_digest=self.state_digest,
            log_digest=self.log_digest,
            anchor_digest=self.anchor.digest,
            momentum_digest=self.anchor.momentum_digest,
            num_values=self.anchor.num_values,
        )
        return self.shards or (only,)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def file_set(self, dtype: str) -> FileSet:
        """The files of the fp32 or the bf16 set. Raises `DataError` where there is none."""
        if dtype == FP32:
            return FileSet(dtype=FP32, files=self.files)
        if dtype != BF16 or not self.bf16:
            raise DataError(
                f"round {self.round} has no {dtype} set",
                "download the fp32 set, and derive one with: swarm export DIR --to hf --dtype bf16",
            )
        own = {file.name: file for file in self.bf16}
        return FileSet(dtype=BF16, files=tuple(own.get(file.name, file) for file in self.files), derived=frozenset(own))

    def canonical_bytes(self) -> bytes:
        left_out = {name for name in ("shards", "bf16") if not getattr(self, name)}  # as before there were any
        return (json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True, indent=1) + "\n").encode()


def derived_names(names: Iterable[str]) -> tuple[str, ...]:
    """Those files of the fp32 set whose bytes are others in the bf16 set, in order."""
    return tuple(
        name for name in names if name == CONFIG_NAME or name.endswith((".safetensors", ".safetensors.index.json"))
    )


def list_file(name: str, chunks: Iterable[bytes]) -> CheckpointFile:
    """Size, SHA-256 and chunk digests of a file that comes in ``chunks`` of `FILE_CHUNK_BYTES`."""
    whole, digests, size_bytes = hashlib.sha256(), list[str](), 0
    for chunk in chunks:
        whole.update(chunk)
        digests.append(sha256(chunk).hex())
        size_bytes += len(chunk)
    return CheckpointFile(name=name, size_bytes=size_bytes, sha256=whole.hexdigest(), chunks=tuple(digests))


def mirror_folder(round_number: int) -> str:
    """Where a mirror holds the checkpoint of this round, under its own URL."""
    return f"checkpoint-{round_number}"


def parse(payload: bytes) -> CheckpointManifest:
    if len(payload) > MAX_MANIFEST_BYTES:
        raise RefusedCheckpoint(f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        values = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RefusedCheckpoint("the manifest is not JSON") from error
    try:
        manifest: CheckpointManifest = parse_section(CheckpointManifest, values, "manifest")
    except SpecError as error:
        raise RefusedCheckpoint(str(error)) from error
    return manifest


def parse_signed(signed: Signed, run_id: bytes, publication_key: bytes) -> CheckpointManifest:
    """The manifest inside ``signed``, once the publication key of this run has signed it."""
    try:
        manifest = parse(verify(signed, CONTEXT, run_id, publication_key))
    except SignatureError as error:
        # A signature names its run, so under another run's manifest it is wrong as well: that is worth knowing.
        if _is_of_another_run(signed.payload, run_id):
            raise RefusedCheckpoint("the manifest belongs to another run") from error
        raise
    if manifest.run_id != run_id.hex():
        raise RefusedCheckpoint("the manifest belongs to another run")
    return manifest


def _is_of_another_run(payload: bytes, run_id: bytes) -> bool:
    try:
        return parse(payload).run_id != run_id.hex()
    except RefusedCheckpoint:
        return False
