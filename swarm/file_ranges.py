"""Ranges of existing files by the digest of their bytes: how files are served without a copy of them.

Decides what counts as there: a regular file, no symbolic link, that is long enough. Leaves comparing with the digest to
whoever reads.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileRange:
    """``length`` bytes of ``path`` from ``offset`` on."""

    path: Path
    offset: int
    length: int


class FileRanges:
    """A source that reads ranges of existing files; a file that is gone or short counts as absent."""

    def __init__(self, ranges: Mapping[bytes, FileRange]) -> None:
        self._ranges = dict(ranges)

    def __call__(self, digest: bytes) -> bytes | None:
        place = self._ranges.get(digest)
        if place is None:
            return None
        return self._read(place)

    def part(self, digest: bytes, offset: int, length: int) -> bytes | None:
        """At most ``length`` bytes from ``offset`` on of what `__call__` returns."""
        place = self._ranges.get(digest)
        if place is None or offset >= place.length:
            return None
        return self._read(FileRange(place.path, place.offset + offset, min(length, place.length - offset)))

    @staticmethod
    def _read(place: FileRange) -> bytes | None:
        try:
            return read_range(place)
        except OSError:
            return None


def read_range(place: FileRange) -> bytes | None:
    """The bytes of ``place``; None where the file is shorter or no regular file. Symbolic links are not followed."""
    descriptor = os.open(place.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size < place.offset + place.length:
            return None
        file.seek(place.offset)
        data = bytearray()
        while len(data) < place.length:
            piece = file.read(place.length - len(data))
            if not piece:
                return None
            data += piece
    return bytes(data)
