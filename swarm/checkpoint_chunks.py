"""The chunks of a checkpoint on this disk, by digest: of its files, and of the bf16 set that is made of them on demand.

Decides that the fp32 set is enough to serve both. Leaves comparing with the digest to whoever reads.
"""

from __future__ import annotations

from pathlib import Path

from swarm.derived import DerivedFile, derive
from swarm.errors import DataError
from swarm.file_ranges import FileRange, FileRanges
from swarm.manifest import BF16, FILE_CHUNK_BYTES, FP32, CheckpointManifest


class FileChunks(FileRanges):
    """``dtype``: the set that lies in ``folder``."""

    def __init__(self, folder: Path, manifest: CheckpointManifest, dtype: str = FP32) -> None:
        self._folder = folder
        self._derived: dict[bytes, FileRange] = {}
        self._open: dict[Path, DerivedFile] = {}
        super().__init__(_ranges(folder, manifest, dtype))
        if dtype == FP32 and manifest.bf16:
            here = self._ranges.keys()
            derived = _ranges(folder, manifest, BF16)
            self._derived = {digest: place for digest, place in derived.items() if digest not in here}

    def __call__(self, digest: bytes) -> bytes | None:
        return self.part(digest, 0, FILE_CHUNK_BYTES)

    def part(self, digest: bytes, offset: int, length: int) -> bytes | None:
        place = self._derived.get(digest)
        if place is None:
            return super().part(digest, offset, length)
        if offset >= place.length:
            return None
        try:
            if place.path not in self._open:
                self._open[place.path] = derive(place.path)
            return self._open[place.path].read(place.offset + offset, min(length, place.length - offset))
        except (OSError, DataError):
            return None


def _ranges(folder: Path, manifest: CheckpointManifest, dtype: str) -> dict[bytes, FileRange]:
    return {
        bytes.fromhex(chunk): FileRange(
            folder / file.name,
            index * FILE_CHUNK_BYTES,
            min(FILE_CHUNK_BYTES, file.size_bytes - index * FILE_CHUNK_BYTES),
        )
        for file in manifest.file_set(dtype).files
        for index, chunk in enumerate(file.chunks)
    }
