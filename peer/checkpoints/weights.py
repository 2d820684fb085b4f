"""The tensors of a checkpoint on disk, one at a time, so that a model larger than memory can be read.

Decides which file holds which tensor; a door to ``safetensors``. Leaves whether the files are what they claim to
`peer.checkpoints.verify`, which runs before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from peer.checkpoints.sets import held_set
from swarm.errors import DataError
from swarm.manifest import CheckpointManifest

_ADVICE = "name a folder that swarm download printed"


class Weights:
    """``shapes``: of every tensor, by name, in sorted order."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        """Raises `DataError` where a file holds no tensors, or two files hold one."""
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in held_set(folder, manifest).files:
            if file.name.endswith(".safetensors"):
                path = folder / file.name
                with _opened(path) as opened:
                    for name in opened.keys():  # noqa: SIM118 - no mapping
                        if name in shapes:
                            raise DataError(f"two files of {folder} hold {name[:80]!r}", _ADVICE)
                        self._files[name] = path
                        shapes[name] = tuple(opened.get_slice(name).get_shape())
        if not shapes:
            raise DataError(f"{folder} holds no weights", _ADVICE)
        self.shapes = dict(sorted(shapes.items()))

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    def files(self) -> dict[str, list[str]]:
        """Names of the tensors in each file, sorted."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            found.setdefault(self._files[name].name, []).append(name)
        return found

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor, fp32 or bf16 in every published checkpoint, in fp32. Raises `DataError` for any other type."""
        with _opened(self._files[name]) as opened:
            dtype = opened.get_slice(name).get_dtype()
            if dtype == "BF16":
                return _widened(self._files[name], name)
            if dtype != "F32":
                raise DataError(f"{name} is {dtype[:20]}, not fp32 or bf16", "use a published checkpoint")
            tensor: npt.NDArray[np.float32] = opened.get_tensor(name)
        return tensor


def _widened(path: Path, name: str) -> npt.NDArray[np.float32]:
    """A bf16 tensor of a file whose header is sound. numpy has no such type, so the library cannot read it for us."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        bits = np.frombuffer(file.read(end - start), "<u2")
    return (bits.astype("<u4") << 16).view("<f4").reshape(entry["shape"])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}", _ADVICE) from error
