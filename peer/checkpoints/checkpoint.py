"""Checkpoint assembly: one round's anchor as a folder that Hugging Face's libraries open as it is.

Decides the layout, the files' exact bytes (the same parts make the same bytes on every machine) and the manifest over
them. This is the door to the ``safetensors`` library. Leaves building the config and collecting the anchor to
`peer.training.model` and the state, the card to `peer.checkpoints.card`, signing to the coordinator, and checking to
`peer.checkpoints.verify`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from peer.checkpoints.anchor import anchor_roots, describe_anchor
from peer.checkpoints.card import CardFacts, model_card
from swarm import manifest as manifests
from swarm.data_manifest import TOKENIZER_NAME, DataManifest
from swarm.derived import describe_derived
from swarm.digest import over_shards, sha256
from swarm.errors import DataError
from swarm.files import disk_errors, fsync_folder, write_durably
from swarm.manifest import FILE_CHUNK_BYTES, CheckpointFile, CheckpointManifest, ShardState, list_file
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication
from swarm.run_spec import RunSpec

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CARD_NAME = "README.md"
MAX_WEIGHTS_FILE_BYTES = 5 * 10**9  # Hugging Face's "5GB"; also what bounds the memory of writing
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")

Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardParts:
    """A shard after the checkpoint's round.

    ``momentum_digest``: Merkle root over its outer momentum's chunks: with the anchor's it makes the state digest.
    """

    num_values: int
    state_digest: bytes
    momentum_digest: bytes
    log_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointParts:
    """Everything that a checkpoint is made of. ``tensors``: fp32, by the family's own parameter names, in the anchor's
    order. ``data_json``: the bytes of the data manifest, whose digest the run spec names; ``data`` is what they say.
    """

    run_id: bytes
    spec: RunSpec
    data: DataManifest
    data_json: bytes
    round: int
    total_tokens: int
    states: tuple[ShardParts, ...]
    """of every shard after the round, as they lie in the anchor"""
    config_json: str
    tokenizer_json: bytes
    tensors: Tensors
    max_file_bytes: int = MAX_WEIGHTS_FILE_BYTES

    def __post_init__(self) -> None:
        if sha256(self.tokenizer_json).hex() != self.spec.data.tokenizer_digest:
            raise DataError("the tokenizer is not the one that the run spec names")
        if sha256(self.data_json).hex() != self.spec.data.manifest_digest:
            raise DataError("the data manifest is not the one that the run spec names")
        wrong = [name for name, tensor in self.tensors.items() if tensor.dtype != np.float32]
        if wrong or not self.tensors:
            raise DataError(f"a checkpoint is made of fp32 tensors: {wrong[:3]}")
        if "auto_map" in json.loads(self.config_json):
            raise DataError("the config asks for code of its own (auto_map)")


def assemble(folder: Path, parts: CheckpointParts) -> CheckpointManifest:
    """Write the checkpoint into ``folder`` and return its (unsigned) manifest.

    All or nothing: files are written next to ``folder`` and renamed at the end; an older ``folder`` is replaced.
    Raises `DiskFull` and `DataError`.
    """
    building = folder.parent / f".{folder.name}.building"
    replaced = folder.parent / f".{folder.name}.replaced"
    for leftover in (building, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with disk_errors(folder):
            building.mkdir(parents=True)
            manifest = _write_files(building, parts)
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(building, folder)
            fsync_folder(folder.parent)
    finally:
        for leftover in (building, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
    return manifest


def write_signed(folder: Path, publication: Publication, signed_spec: Signed) -> None:
    """Put manifest, signature, witnesses, roots and the signed run spec beside the files. Raises `DiskFull`."""
    write_durably(folder / manifests.SPEC_FILE, signed_spec.SerializeToString(deterministic=True))
    write_durably(folder / manifests.WITNESSES_FILE, publication.witnesses.SerializeToString(deterministic=True))
    if publication.roots is None:
        # Roots of an earlier signature would lead to another key than the one that signed this.
        (folder / manifests.ROOTS_FILE).unlink(missing_ok=True)
    else:
        write_durably(folder / manifests.ROOTS_FILE, publication.roots.SerializeToString(deterministic=True))
    write_durably(folder / manifests.MANIFEST_FILE, publication.manifest.payload)
    write_durably(folder / manifests.SIGNATURE_FILE, publication.manifest.SerializeToString(deterministic=True))


def describe_file(path: Path) -> CheckpointFile:
    """Name, size, SHA-256 and chunk digests of ``path``, in one pass over it."""
    with open(path, "rb") as file:
        return list_file(path.name, iter(lambda: file.read(FILE_CHUNK_BYTES), b""))


def _write_files(folder: Path, parts: CheckpointParts) -> CheckpointManifest:
    end_of_text, shards = _end_of_text(parts), _shard_states(parts)
    write_durably(folder / "config.json", parts.config_json.encode())
    write_durably(folder / "generation_config.json", _json(_generation_config(parts.data.end_of_text_id)))
    write_durably(folder / "tokenizer_config.json", _json(_tokenizer_config(end_of_text, parts.config_json)))
    write_durably(folder / TOKENIZER_NAME, parts.tokenizer_json)
    _write_weights(folder, parts.tensors, parts.max_file_bytes)
    write_durably(folder / manifests.DATA_FILE, parts.data_json)
    write_durably(folder / CARD_NAME, model_card(card_facts(parts, _listed(shards))).encode())
    files = tuple(describe_file(path) for path in sorted(folder.iterdir()))
    return CheckpointManifest(
        run_id=parts.run_id.hex(),
        run_name=parts.spec.name,
        round=parts.round,
        total_tokens=parts.total_tokens,
        state_digest=over_shards([state.state_digest for state in parts.states]).hex(),
        log_digest=over_shards([state.log_digest for state in parts.states]).hex(),
        shards=_listed(shards),
        data_manifest_digest=parts.spec.data.manifest_digest,
        anchor=describe_anchor(parts.tensors, shards),
        files=files,
        bf16=describe_derived(folder, files),
    )


def _shard_states(parts: CheckpointParts) -> tuple[ShardState, ...]:
    roots = anchor_roots(parts.tensors, [state.num_values for state in parts.states])
    return tuple(
        ShardState(
            state_digest=state.state_digest.hex(),
            log_digest=state.log_digest.hex(),
            anchor_digest=root.hex(),
            momentum_digest=state.momentum_digest.hex(),
            num_values=state.num_values,
        )
        for state, root in zip(parts.states, roots, strict=True)
    )


def _write_weights(folder: Path, tensors: Tensors, max_file_bytes: int) -> None:
    groups = _split(tensors, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file_name = WEIGHTS_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _save({name: np.ascontiguousarray(tensors[name]) for name in names}, folder / file_name)
        with open(folder / file_name, "rb") as file:
            os.fsync(file.fileno())
        weight_map.update(dict.fromkeys(names, file_name))
    if len(groups) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        count = sum(tensor.size for tensor in tensors.values())
        index = {"metadata": {"total_parameters": count, "total_size": total}, "weight_map": weight_map}
        write_durably(folder / INDEX_NAME, _json(index))


def _save(tensors: dict[str, npt.NDArray[np.float32]], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library tells what the system said in words alone.
        said = re.search(r"\(os error (\d+)\)", str(error))
        if said is None:
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from error


def _split(tensors: Tensors, max_file_bytes: int) -> list[list[str]]:
    """Names in sorted order, cut where a file would exceed the limit (a larger tensor has a file of its own)."""
    groups: list[list[str]] = [[]]
    size_bytes = 0
    for name in sorted(tensors):
        if groups[-1] and size_bytes + tensors[name].nbytes > max_file_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(name)
        size_bytes += tensors[name].nbytes
    return groups


def _end_of_text(parts: CheckpointParts) -> str:
    """The text of the end-of-text token, from the tokenizer itself."""
    wanted = parts.data.end_of_text_id
    tokenizer = json.loads(parts.tokenizer_json)
    for token in tokenizer.get("added_tokens", []):
        if token.get("id") == wanted:
            return str(token["content"])
    for content, token_id in tokenizer.get("model", {}).get("vocab", {}).items():
        if token_id == wanted:
            return str(content)
    raise DataError(f"the tokenizer has no token with the end-of-text id {wanted}")


def _generation_config(end_of_text_id: int) -> dict[str, object]:
    # Padding is named so that generate() need not guess it; batches are masked, so the id itself does not matter.
    return {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id, "pad_token_id": end_of_text_id}


def _tokenizer_config(end_of_text: str, config_json: str) -> dict[str, object]:
    config = json.loads(config_json)
    context = next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    return ({} if context is None else {"model_max_length": context}) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }


def _listed(shards: tuple[ShardState, ...]) -> tuple[ShardState, ...]:
    return shards if len(shards) > 1 else ()


def card_facts(parts: CheckpointParts, shards: tuple[ShardState, ...] = ()) -> CardFacts:
    """What every replica knows alike; what only the coordinator knows is no part of it."""
    return CardFacts(
        run_id=parts.run_id,
        spec=parts.spec,
        data=parts.data,
        round=parts.round,
        total_tokens=parts.total_tokens,
        state_digest=over_shards([state.state_digest for state in parts.states]).hex(),
        log_digest=over_shards([state.log_digest for state in parts.states]).hex(),
        shards=shards,
        num_parameters=sum(tensor.size for tensor in parts.tensors.values()),
    )


def _json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=2) + "\n").encode()
