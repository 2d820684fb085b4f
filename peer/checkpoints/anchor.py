"""The anchor within a checkpoint: described when it is made, recomputed from its weights when it is checked.

Decides that the digest which witnesses signed is that of the published weights and of nothing else: every parameter in
its place, in fp32, each tensor of the files used once. Leaves signatures and every other byte to
`peer.checkpoints.verify`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from swarm.derived import MAX_HEADER_BYTES
from swarm.digest import ChunkRoot, over_shards
from swarm.errors import DataError
from swarm.manifest import VALUE_BYTES, Anchor, CheckpointManifest, Parameter, ShardState

READ_BYTES = 4 << 20

OpenFile = Callable[[Path], BinaryIO]


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    offset: int


def anchor_roots(tensors: Mapping[str, npt.NDArray[np.float32]], sizes: Sequence[int]) -> list[bytes]:
    """The Merkle root over the chunks of each shard's anchor.

    ``tensors``: the parameters of all shards, in the anchor's order; ``sizes``: values of each shard, in order.
    Raises `DataError` where they are not as many.
    """
    roots = _ShardRoots(sizes)
    for tensor in tensors.values():
        roots.update(np.ascontiguousarray(tensor, dtype="<f4").reshape(-1).view(np.uint8).data)
    return roots.roots()


def describe_anchor(tensors: Mapping[str, npt.NDArray[np.float32]], states: Sequence[ShardState]) -> Anchor:
    """What the manifest says of the anchor as a whole: ``tensors`` are its parameters, in its order."""
    return Anchor(
        digest=over_shards([bytes.fromhex(state.anchor_digest) for state in states]).hex(),
        momentum_digest=over_shards([bytes.fromhex(state.momentum_digest) for state in states]).hex(),
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
            if _roots(places, manifest, open_file) == [bytes.fromhex(state.anchor_digest) for state in manifest.states]
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


class _ShardRoots:
    """Merkle roots over the anchors of shards, whose bytes come one after the other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._left = [VALUE_BYTES * size for size in sizes]
        self._roots = [ChunkRoot() for _ in sizes]
        self._shard = 0

    def update(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            while self._shard < len(self._left) and not self._left[self._shard]:
                self._shard += 1
            if self._shard == len(self._left):
                raise DataError("the weights have more values than the shards")
            part = rest[: self._left[self._shard]]
            self._roots[self._shard].update(part)
            self._left[self._shard] -= len(part)
            rest = rest[len(part) :]

    def roots(self) -> list[bytes]:
        if any(self._left):
            raise DataError("the weights have fewer values than the shards")
        return [root.root() for root in self._roots]


def _roots(places: Mapping[str, _Place], manifest: CheckpointManifest, open_file: OpenFile) -> list[bytes]:
    roots = _ShardRoots([state.num_values for state in manifest.states])
    files: dict[Path, BinaryIO] = {}
    try:
        for parameter in manifest.anchor.parameters:
            place = places[parameter.name]
            if place.path not in files:
                files[place.path] = open_file(place.path)
            _feed(roots, files[place.path], place.offset, parameter.size_bytes)
    finally:
        for file in files.values():
            file.close()
    return roots.roots()


def _feed(roots: _ShardRoots, file: BinaryIO, offset: int, size_bytes: int) -> None:
    while size_bytes:
        data = os.pread(file.fileno(), min(READ_BYTES, size_bytes), offset)
        if not data:
            raise DataError("a file ends before its weights do")
        roots.update(data)
        offset, size_bytes = offset + len(data), size_bytes - len(data)
