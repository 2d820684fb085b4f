"""The tensors of a checkpoint on disk, one at a time, so that a model larger than memory can be read.

Decides which file holds which tensor; a door to ``safetensors``. Leaves whether the files are what they claim to
`peer.checkpoints.verify`, which runs before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from swarm.errors import DataError
from swarm.manifest import CheckpointManifest

_ADVICE = "name a folder that swarm download printed"


class Weights:
    """``shapes``: of every tensor, by name, in sorted order."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        """Raises `DataError` where a file holds no tensors, or two files hold one."""
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in manifest.files:
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
        """The tensor, which is fp32 in every published checkpoint. Raises `DataError` for any other type."""
        with _opened(self._files[name]) as opened:
            if opened.get_slice(name).get_dtype() != "F32":
                raise DataError(f"{name} is not fp32", "use a published checkpoint, not a set derived from one")
            tensor: npt.NDArray[np.float32] = opened.get_tensor(name)
        return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}", _ADVICE) from error
