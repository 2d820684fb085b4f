"""A checkpoint's files on disk, filled: which chunks are there, which are not, and those fetched and put in place.

Decides that a chunk is written to its place only after its digest was right, that bytes which lie in an earlier
checkpoint are copied instead of fetched, and that links and other irregular files are never written through. Leaves
the folder's name, the signatures and the final check to `peer.checkpoints.download` and `peer.checkpoints.repair`.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peer.checkpoints.pieces import Pieces
from peer.checkpoints.sets import held_set
from peer.checkpoints.sources import LIMITS, Chunk, Intake, Pace, Source, Tally, by_key
from peer.p2p.fetch import FetchLimits, HolderBook, Wanted, fetch_from
from swarm.checkpoint_chunks import FileChunks
from swarm.digest import sha256
from swarm.errors import ConfigError, DiskFull, VerificationError
from swarm.file_ranges import FileRange, read_range
from swarm.files import disk_errors
from swarm.manifest import FILE_CHUNK_BYTES, CheckpointFile, CheckpointManifest, FileSet

PIECES_FOLDER = ".pieces"
_SPARE_DISK_BYTES = 16 << 20

Missing = dict[bytes, list[FileRange]]
"""Where the bytes of each digest that is not there belong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """From whom, how fast, and who is told. ``max_bytes_per_s`` None: as fast as it goes."""

    sources: Sequence[Source]
    tally: Tally = field(default_factory=Tally)
    limits: FetchLimits = LIMITS
    book: HolderBook = field(default_factory=lambda: HolderBook(random.Random()))
    max_bytes_per_s: float | None = None


async def fill(
    folder: Path, files: FileSet, earlier: Iterable[tuple[Path, CheckpointManifest]], fetching: Fetching
) -> None:
    """Make ``files`` in ``folder`` whole; what is right there already is kept.

    ``earlier``: checkpoints on this disk. Raises `NotFound` (run it again: it resumes), `DiskFull`, `ConfigError`.
    """
    missing = await asyncio.to_thread(_prepare, folder, files)
    fetching.tally.copied_bytes += await asyncio.to_thread(_copy, earlier, missing)
    pieces = await asyncio.to_thread(Pieces, folder / PIECES_FOLDER, missing)
    _check_space(folder, missing, fetching.limits.total)
    await _fetch(files, missing, pieces, fetching)
    pieces.close()


def _prepare(folder: Path, files: FileSet) -> Missing:
    """Give every file its size; the ranges whose bytes are not there yet, by digest."""
    missing: Missing = {}
    for file in files.files:
        is_new = _allocate(folder / file.name, file.size_bytes)
        for digest, place in _chunks(folder, file):
            data = None if is_new else read_range(place)
            if data is None or sha256(data) != digest:
                missing.setdefault(digest, []).append(place)
    return missing


def _copy(earlier: Iterable[tuple[Path, CheckpointManifest]], missing: Missing) -> int:
    """Copy what lies in other checkpoints, after checking it; how many bytes needed no fetching."""
    copied = 0
    for folder, manifest in earlier:
        held = FileChunks(folder, manifest, held_set(folder, manifest).dtype)
        for digest in list(missing):
            data = held(digest)
            if data is not None and sha256(data) == digest:
                copied += len(data)
                for place in missing.pop(digest):
                    _write_range(place, data)
    return copied


def _allocate(path: Path, size_bytes: int) -> bool:
    """Make ``path`` a regular file of this size, keeping its bytes; whether it is new."""
    is_new = not os.path.lexists(path)
    descriptor = _open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)
    return is_new


def _open_regular(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except (IsADirectoryError, FileNotFoundError):
        pass
    except OSError as error:
        if not path.is_symlink():
            raise
        raise ConfigError(f"{path} is a symbolic link", "move it away and try again") from error
    raise ConfigError(f"{path} is no regular file", "move it away and try again")


def _chunks(folder: Path, file: CheckpointFile) -> Iterator[tuple[bytes, FileRange]]:
    for index, chunk in enumerate(file.chunks):
        offset = index * FILE_CHUNK_BYTES
        length = min(FILE_CHUNK_BYTES, file.size_bytes - offset)
        yield bytes.fromhex(chunk), FileRange(folder / file.name, offset, length)


def _check_space(folder: Path, missing: Missing, under_way: int) -> None:
    needed = sum(place.length for places in missing.values() for place in places)
    unfinished = min(needed, under_way * FILE_CHUNK_BYTES)
    free = shutil.disk_usage(folder).free
    if needed and needed + unfinished + _SPARE_DISK_BYTES > free:
        raise DiskFull(
            f"the checkpoint needs {needed:,} more bytes and the disk of {folder.parent} has {free:,}",
            "free some space, or choose another folder with --out",
        )


async def _fetch(files: FileSet, missing: Missing, pieces: Pieces, fetching: Fetching) -> None:
    tally, total = fetching.tally, files.size_bytes
    done = total - sum(place.length for places in missing.values() for place in places)
    tally.on_progress(done, total)

    def put(digest: bytes, data: bytes) -> None:
        for place in missing[digest]:
            _write_range(place, data)
        pieces.forget(digest)

    async def store(item: Wanted, data: bytes) -> None:
        nonlocal done
        await asyncio.to_thread(put, item.digest, data)
        done += sum(place.length for place in missing[item.digest])
        tally.chunks_fetched += 1
        tally.on_progress(done, total)

    sources = by_key(fetching.sources)
    places = {digest: found[0] for digest, found in missing.items()}
    intake = Intake(
        sources=sources,
        chunks={
            digest: Chunk(digest=digest, file=files.place(place.path.name), offset=place.offset, length=place.length)
            for digest, place in places.items()
        },
        pieces=pieces,
        pace=Pace(fetching.max_bytes_per_s),
        tally=tally,
        book=fetching.book,
    )
    wanted = [Wanted(digest, place.length) for digest, place in places.items()]
    await fetch_from(intake.ask, wanted, list(sources), store, fetching.limits, fetching.book)


def _write_range(place: FileRange, data: bytes) -> None:
    if len(data) != place.length:
        raise VerificationError(f"a chunk of {place.path.name} has {len(data)} bytes instead of {place.length}")
    descriptor = _open_regular(place.path, os.O_WRONLY)
    try:
        with disk_errors(place.path):
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, memoryview(data)[written:], place.offset + written)
    finally:
        os.close(descriptor)
