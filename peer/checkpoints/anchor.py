"""The anchor within a checkpoint: described when it is made, recomputed from its weights when it is checked.

Decides that the digest which witnesses signed is that of the published weights and of nothing else: every parameter in
its place, in fp32, each tensor of the files used once. Leaves signatures and every other byte to
`peer.checkpoints.verify`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from swarm.digest import ChunkRoot
from swarm.errors import DataError
from swarm.manifest import Anchor, CheckpointManifest, Parameter

READ_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

OpenFile = Callable[[Path], BinaryIO]


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    offset: int


def describe_anchor(tensors: Mapping[str, npt.NDArray[np.float32]], momentum_digest: bytes) -> Anchor:
    """What the manifest says of the state: ``tensors`` are the anchor's parameters, in its order."""
    root = ChunkRoot()
    for tensor in tensors.values():
        root.update(np.ascontiguousarray(tensor, dtype="<f4").reshape(-1).view(np.uint8).data)
    return Anchor(
        digest=root.root().hex(),
        momentum_digest=momentum_digest.hex(),
        parameters=tuple(Parameter(name=name, shape=tensor.shape) for name, tensor in tensors.items()),
    )


def anchor_problem(folder: Path, manifest: CheckpointManifest, open_file: OpenFile) -> str | None:
    """Why the weights in ``folder`` are not the anchor that the manifest names; None where they are.

    The files' bytes must be those of the manifest already, and their headers sound.
    """
    try:
        places = _places(folder, manifest, open_file)
        if set(places) != {parameter.name for parameter in manifest.anchor.parameters}:
            return "the weights are not the parameters that the manifest lists"
        return (
            None
            if _root(places, manifest.anchor, open_file).hex() == manifest.anchor.digest
            else ("the weights do not have the anchor digest that the manifest names")
        )
    except (OSError, DataError) as error:
        return f"the weights cannot be read: {error}"


def read_anchor(folder: Path, manifest: CheckpointManifest, open_file: OpenFile, room: memoryview) -> None:
    """Fill ``room`` with the anchor of a verified checkpoint. Raises `DataError` where it is of another size."""
    if len(room) != sum(parameter.size_bytes for parameter in manifest.anchor.parameters):
        raise DataError(f"{folder} holds a model of another size than the run's")
    places, offset = _places(folder, manifest, open_file), 0
    for parameter in manifest.anchor.parameters:
        place = places[parameter.name]
        with open_file(place.path) as file:
            file.seek(place.offset)
            read = file.readinto(room[offset : offset + parameter.size_bytes])  # type: ignore[attr-defined]
        if read != parameter.size_bytes:
            raise DataError(f"{place.path.name} ends before its weights do")
        offset += parameter.size_bytes


def _places(folder: Path, manifest: CheckpointManifest, open_file: OpenFile) -> dict[str, _Place]:
    """Where each tensor lies. Raises `DataError` for one that is not what the manifest says, or comes twice."""
    shapes = {parameter.name: list(parameter.shape) for parameter in manifest.anchor.parameters}
    places: dict[str, _Place] = {}
    for listed in manifest.files:
        if not listed.name.endswith(".safetensors"):
            continue
        path = folder / listed.name
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in places or entry["dtype"] != "F32" or entry["shape"] != shapes.get(name):
                raise DataError(f"{listed.name} holds {name[:80]!r}, which is not a parameter of the anchor in fp32")
            places[name] = _Place(path, 8 + length + entry["data_offsets"][0])
    return places


def _root(places: Mapping[str, _Place], anchor: Anchor, open_file: OpenFile) -> bytes:
    root = ChunkRoot()
    files: dict[Path, BinaryIO] = {}
    try:
        for parameter in anchor.parameters:
            place = places[parameter.name]
            if place.path not in files:
                files[place.path] = open_file(place.path)
            _feed(root, files[place.path], place.offset, parameter.size_bytes)
    finally:
        for file in files.values():
            file.close()
    return root.root()


def _feed(root: ChunkRoot, file: BinaryIO, offset: int, size_bytes: int) -> None:
    while size_bytes:
        data = os.pread(file.fileno(), min(READ_BYTES, size_bytes), offset)
        if not data:
            raise DataError("a file ends before its weights do")
        root.update(data)
        offset, size_bytes = offset + len(data), size_bytes - len(data)
