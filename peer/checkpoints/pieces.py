"""Unfinished chunks on disk: what arrived of a chunk before it is whole, so that a kill loses next to nothing.

Decides that these bytes lie apart, one file per chunk, named by its digest, and that nothing is believed of them: a
chunk is compared with its digest once it is whole, and only then goes to its place. Remembers who sent what, because
only a chunk that came from one source alone proves that source a liar. Errors of the disk are plain `OSError`: they are
nobody's fault but ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from swarm.digest import sha256

_EARLIER = "an earlier attempt"


@dataclass(slots=True)
class Part:
    """The first bytes of a chunk, and who sent them."""

    path: Path
    data: bytearray = field(default_factory=bytearray)
    senders: set[str] = field(default_factory=set)

    def append(self, piece: bytes, sender: str) -> None:
        """Add what ``sender`` sent next; it is on disk when this returns (in the kernel's hands, not synced).

        That takes less than a thread would to be asked for it.
        """
        with open(self.path, "ab", buffering=0) as file:
            file.write(piece)
        self.data += piece
        self.senders.add(sender)

    def whole(self, digest: bytes) -> bytes | None:
        """All bytes, where they have this digest."""
        data = bytes(self.data)
        return data if sha256(data) == digest else None

    def discard(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self.data.clear()
        self.senders.clear()


class Pieces:
    """The parts in ``folder``."""

    def __init__(self, folder: Path, wanted: Collection[bytes]) -> None:
        """Keep what lies there of the ``wanted`` digests; anything else goes."""
        self._folder = folder
        self._parts: dict[bytes, Part] = {}
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            folder.unlink()
        folder.mkdir(exist_ok=True)
        names = {digest.hex() for digest in wanted}
        for entry in list(os.scandir(folder)):
            if entry.name not in names or not entry.is_file(follow_symlinks=False):
                _remove(Path(entry.path))

    def open(self, digest: bytes, max_bytes: int) -> Part:
        """What is here of a chunk of at most ``max_bytes``."""
        part = self._parts.get(digest)
        if part is None:
            part = self._parts[digest] = Part(self._folder / digest.hex())
            if part.path.exists():
                part.data += part.path.read_bytes() if part.path.stat().st_size <= max_bytes else b""
                part.senders.add(_EARLIER)
            if len(part.data) == 0:
                part.discard()
        return part

    def forget(self, digest: bytes) -> None:
        """The chunk is at its place."""
        part = self._parts.pop(digest, None)
        if part is not None:
            part.discard()

    def close(self) -> None:
        """Nothing is unfinished any more: remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
