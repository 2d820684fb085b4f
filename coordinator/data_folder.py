"""The folder of prepared data on disk: appears whole or not at all, and can be checked again.

Decides where half-written data waits (a hidden, locked folder next to the final one), what may be replaced, and what
a full disk is called. Leaves what is written to `coordinator.data_prepare`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from swarm.data_manifest import INDEX_NAME, MANIFEST_NAME, TOKENIZER_NAME, DataManifest
from swarm.errors import AlreadyRunning, ConfigError, DigestError, DiskFull

# No space, quota used up, the process's file size limit reached.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUR_FILES = re.compile(r"^(train|validation)-[0-9]{5,9}\.bin$|^tokenizer\.json$|^manifest\.json$|^documents\.idx$")


def resolved(out: Path) -> Path:
    """The absolute path of the folder to write. Raises `ConfigError` where it is none that can be replaced."""
    path = out.resolve()
    advice = "name a new folder with --out"
    if not path.name:
        raise ConfigError(f"{path} is not a folder to replace", advice)
    if path == Path.cwd():
        raise ConfigError(f"{path} is the current folder", advice)
    return path


def staging_folder(out: Path) -> Path:
    """Where the data of ``out`` (resolved) waits until it is complete."""
    return out.with_name(f".{out.name}.partial")


def check_replaceable(out: Path, force: bool) -> None:
    """Raise `ConfigError` unless ``out`` is absent or empty, or holds only prepared data and ``force`` is set."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", "name a new folder with --out")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not names:
        return
    foreign = [name for name in names if not _OUR_FILES.match(name)]
    if foreign or MANIFEST_NAME not in names:
        raise ConfigError(f"{out} holds other files ({(foreign or names)[0]})", "name a new or empty folder with --out")
    if not force:
        raise ConfigError(f"{out} already holds prepared data", "name another folder, or replace it with --force")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A locked folder next to ``out`` that becomes ``out`` when the body succeeds and goes away when it fails.

    Raises `AlreadyRunning` where another process holds it, `DiskFull`, `ConfigError` where nothing can be written.
    """
    staging = staging_folder(out)
    with _named_errors(staging):
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    try:
        _lock(lock, out)
        with _named_errors(staging):
            _empty(staging)
        try:
            yield staging
            with _named_errors(out):
                _publish(staging, out)
        finally:
            if staging.exists() and os.path.samestat(os.fstat(lock), staging.stat()):
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(lock)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and force it to the disk. Raises `DiskFull`, or `ConfigError` where it cannot be written."""
    with _named_errors(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def opened_durably(path: Path) -> Iterator[BinaryIO]:
    """A new file to write piece by piece, forced to the disk at the end. Raises as `write_durably`."""
    with _named_errors(path), path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path, manifest: DataManifest, progress: Callable[[str], None]) -> None:
    """Recompute the digests of a prepared folder's files; ``progress`` is told each file that is right.

    Raises `DigestError`, naming the file, at the first that differs or cannot be read.
    """
    _verify_file(folder / TOKENIZER_NAME, manifest.tokenizer_digest)
    progress(TOKENIZER_NAME)
    if manifest.documents_digest is not None:
        _verify_file(folder / INDEX_NAME, manifest.documents_digest)
    for shard in (*manifest.train, *manifest.validation):
        _verify_file(folder / shard.file, shard.digest)
        progress(shard.file)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            advice = "free some space, or name a folder on another disk with --out; nothing half-written is left"
            raise DiskFull(f"no space left for {path}", advice) from error
        raise ConfigError(f"cannot write {path}: {error.strerror}", "name a folder that you can write") from error


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        advice = "wait until it is done, or name another folder with --out"
        raise AlreadyRunning(f"another `swarm data prepare` is writing {out}", advice) from error


def _empty(folder: Path) -> None:
    """Remove what a killed process left; never anything else."""
    for path in sorted(folder.iterdir()):
        if not _OUR_FILES.match(path.name):
            raise ConfigError(f"{path} is in the way", "move it away")
        path.unlink()


def _publish(staging: Path, out: Path) -> None:
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    staging.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _verify_file(path: Path, digest_hex: str) -> None:
    advice = "prepare the data again, or copy the file again from where it came"
    actual = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                actual.update(block)
    except OSError as error:
        raise DigestError(f"{path} cannot be read: {error.strerror}", advice) from error
    if actual.hexdigest() != digest_hex:
        raise DigestError(f"{path} does not match its digest in {MANIFEST_NAME}", advice)
