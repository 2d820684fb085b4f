"""A set derived from a published checkpoint: the same model in another number format, in Hugging Face layout.

Decides what is copied, what is converted, and that the set names its origin (``origin.json``) and carries a card with
everything that is known by then, evaluations too. Not signed by the run: whoever doubts it derives it again. This is a
door to ``torch`` and ``safetensors``. Leaves checking the origin to the caller.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peer.checkpoints.card import model_card
from peer.checkpoints.checkpoint import CARD_NAME, INDEX_NAME
from peer.checkpoints.facts import FolderFacts, manifest_digest
from peer.checkpoints.weights import Weights
from swarm import __version__
from swarm.data_manifest import TOKENIZER_NAME
from swarm.errors import ConfigError, DataError
from swarm.files import disk_errors, file_sha256, fsync_folder, write_durably
from swarm.manifest import DATA_FILE
from swarm.run_record import RECORD_FILE

if TYPE_CHECKING:
    import torch

ORIGIN_NAME = "origin.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_COPIED = ("generation_config.json", "tokenizer_config.json", TOKENIZER_NAME, DATA_FILE, RECORD_FILE)

OnTensor = Callable[[], object]


def export_hf(facts: FolderFacts, out: Path, dtype: str, on_tensor: OnTensor = lambda: None) -> Path:
    """Write the set into the new folder ``out``, whole or not at all.

    Raises `ConfigError` for an ``out`` that exists or a dtype that is none, `DataError` where a value has no place in
    the format, `DiskFull`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"{dtype!r} is no format of weights", f"choose one of {', '.join(DTYPES)}")
    refuse_existing(out)
    building = out.parent / f".{out.name}.building"
    shutil.rmtree(building, ignore_errors=True)
    try:
        with disk_errors(out):
            building.mkdir(parents=True)
            _write(facts, building, dtype, on_tensor)
            os.replace(building, out)
            fsync_folder(out.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def refuse_existing(out: Path) -> None:
    """Raise `ConfigError` where ``out`` is there already: nothing is ever replaced."""
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already", "choose another --out, or move it away")


def _write(facts: FolderFacts, building: Path, dtype: str, on_tensor: OnTensor) -> None:
    source, manifest = facts.folder, facts.provenance.manifest
    listed = {file.name for file in manifest.files}
    for name in _COPIED:
        if name in listed:
            shutil.copyfile(source / name, building / name)
    config = json.loads((source / "config.json").read_bytes())
    _write_json(building / "config.json", {**config, "dtype": DTYPES[dtype]})
    weights = Weights(source, manifest)
    for file_name, names in weights.files().items():
        _convert(weights, names, building / file_name, dtype, on_tensor)
    if INDEX_NAME in listed:
        index = json.loads((source / INDEX_NAME).read_bytes())
        item_bytes = 4 if dtype == "fp32" else 2
        index["metadata"]["total_size"] = weights.num_parameters * item_bytes
        _write_json(building / INDEX_NAME, index)
    digest = manifest_digest(facts.provenance)
    card = replace(facts.card, dtype=DTYPES[dtype], derived_from=digest)
    write_durably(building / CARD_NAME, model_card(card).encode())
    files = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
    origin = {**origin_of(facts), "dtype": dtype, "files": files}
    _write_json(building / ORIGIN_NAME, origin)


def origin_of(facts: FolderFacts) -> dict[str, object]:
    """What any derived file says of where it comes from."""
    manifest = facts.provenance.manifest
    return {
        "format": 1,
        "made_by": f"swarmtrain/{__version__}",
        "run_name": manifest.run_name,
        "run_id": manifest.run_id,
        "round": manifest.round,
        "total_tokens": manifest.total_tokens,
        "state_digest": manifest.state_digest,
        "manifest_digest": manifest_digest(facts.provenance),
    }


def _convert(weights: Weights, names: list[str], path: Path, dtype: str, on_tensor: OnTensor) -> None:
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors[name] = torch.from_numpy(weights.read(name)).to(getattr(torch, DTYPES[dtype]))
        if not torch.isfinite(tensors[name]).all():
            raise DataError(f"{name} holds values beyond {dtype}", "choose bf16 or fp32")
        on_tensor()
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, value: object) -> None:
    write_durably(path, (json.dumps(value, sort_keys=True, indent=2) + "\n").encode())
