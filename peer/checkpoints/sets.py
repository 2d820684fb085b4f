"""Which of a checkpoint's sets a folder holds: fp32, as the state is that witnesses signed, or bf16, derived from it.

Decides by the sizes of the files in which the two differ, so that a folder may have any name, and one damaged file does
not make it another set. Where sizes do not tell, it is what the name says that a download gave the folder. Leaves their
bytes to `peer.checkpoints.verify`.
"""

from __future__ import annotations

from pathlib import Path

from swarm.errors import DataError
from swarm.manifest import BF16, FP32, CheckpointManifest, FileSet

BF16_ENDING = f"-{BF16}"


def held_set(folder: Path, manifest: CheckpointManifest) -> FileSet:
    """The set whose own files are here more than the other's; of as many, bf16 where the folder is named so."""
    if not manifest.bf16:
        return manifest.file_set(FP32)
    bf16 = manifest.file_set(BF16)
    sizes = {name: _size_bytes(folder / name) for name in bf16.derived}
    fp32_here = sum(sizes.get(file.name) == file.size_bytes for file in manifest.files)
    bf16_here = sum(sizes[file.name] == file.size_bytes for file in manifest.bf16)
    named_so = folder.name.endswith(BF16_ENDING)
    return bf16 if bf16_here > fp32_here - named_so else manifest.file_set(FP32)


def set_beside(folder: Path, held: FileSet, manifest: CheckpointManifest) -> FileSet | None:
    """The bf16 set's own files where they lie in a folder ``bf16`` beside the fp32 set, as they do on a mirror."""
    path = folder / BF16
    if held.dtype != FP32 or not manifest.bf16 or path.is_symlink() or not path.is_dir():
        return None
    return FileSet(dtype=BF16, files=manifest.bf16, derived=manifest.file_set(BF16).derived)


def require_fp32(folder: Path, manifest: CheckpointManifest, what: str) -> None:
    """Raise `DataError` where ``folder`` holds another set; ``what`` needs this one."""
    if held_set(folder, manifest).dtype != FP32:
        raise DataError(
            f"{folder} holds the bf16 set, and {what} needs the fp32 set",
            f"fetch that: swarm download INVITE@{manifest.round}",
        )


def _size_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return -1
