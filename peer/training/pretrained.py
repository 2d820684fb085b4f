"""Reading an existing checkpoint on this machine, to go on training from it.

Decides which of its tensors are a span's, under which older names they may stand, and what makes a checkpoint unfit.
Reads only the tensors that are asked for, and safetensors files only: nothing in them can be code. Leaves the model to
`peer.training.model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from swarm.errors import DataError
from swarm.families import Family

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_values(
    folder: Path, family: Family, shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters ``shapes`` (name, shape) out of the checkpoint in ``folder``: (name, fp32 on the CPU), in order.

    A head that the checkpoint does not have is its embedding (it was tied). Raises `DataError` for a checkpoint that is
    not in safetensors files, lacks a parameter, or has it in another shape or type.
    """
    files = _files(folder)
    for name, shape in shapes:
        stored = _stored_name(name, family, files)
        if stored is None:
            raise DataError(
                f"{folder} has no tensor {name}", "check that family and [model.config] are those of the checkpoint"
            )
        yield name, _read(files[stored], stored, shape)


def _stored_name(name: str, family: Family, files: Mapping[str, Path]) -> str | None:
    """The name of a parameter in the files: today's, an older one, or (of a base model alone) without the prefix."""
    candidates = [name, *(old + name.removeprefix(new) for old, new in family.older_names if name.startswith(new))]
    if name == f"{family.head}.weight":
        candidates.append(f"{family.base}.{family.embedding}.weight")
    candidates += [candidate.removeprefix(f"{family.base}.") for candidate in candidates]
    return next((candidate for candidate in candidates if candidate in files), None)


def _read(path: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise DataError(
                    f"{name} has shape {list(found)} in {path.name}, and {list(shape)} in this model",
                    "[model.config] and the tokenizer must be those of the checkpoint",
                )
            value: torch.Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}", "fetch the checkpoint again") from error
    if value.dtype not in FLOATS:
        raise DataError(
            f"{name} in {path.name} is {value.dtype}, not a float", "use a checkpoint that is not quantised"
        )
    value = value.to(torch.float32)
    if not torch.isfinite(value).all():
        raise DataError(f"{name} in {path.name} is not finite")
    return value


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    whole, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    try:
        if whole.is_file():
            with safe_open(whole, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), whole)
        if index.is_file() and index.stat().st_size <= MAX_INDEX_BYTES:
            return _from_index(folder, json.loads(index.read_bytes()))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise DataError(f"the checkpoint in {folder} cannot be read: {error}", "fetch it again") from error
    raise DataError(
        f"{folder} holds no checkpoint in safetensors files ({WEIGHTS_NAME} or {INDEX_NAME})",
        "other formats can hold code and are never opened; convert it with its publisher's tools",
    )


def _from_index(folder: Path, index: Any) -> dict[str, Path]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{INDEX_NAME} has no weight_map")
    files: dict[str, Path] = {}
    for name, file_name in weight_map.items():
        if (
            not isinstance(file_name, str)
            or Path(file_name).name != file_name
            or not file_name.endswith(".safetensors")
        ):
            raise ValueError(f"{INDEX_NAME} names {str(file_name)[:80]!r}, which is no file beside it")
        files[name] = folder / file_name
    return files
