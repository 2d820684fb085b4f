"""Files that survive a crash: whole or not at all, and what a full disk is called. No decisions of any domain."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from swarm.errors import DiskFull

TEMPORARY_PREFIX = ".tmp-"
# No space, quota used up, the process's file size limit reached.
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into `DiskFull` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL_ERRNOS:
            raise DiskFull(f"no space left for {path}", "free some space, or choose another folder") from error
        raise


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Write ``path`` so that after a crash it holds all ``pieces`` or what it held before. Raises `DiskFull`."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    try:
        with disk_errors(path):
            with open(temporary, "xb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex, without holding them all."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            whole.update(piece)
    return whole.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Kept(Protocol):
    """Bytes that may lie on disk: ``kept[:]`` are all of them, as they are of `bytes`, which is one of these."""

    def __len__(self) -> int: ...
    def __getitem__(self, span: slice, /) -> bytes: ...
