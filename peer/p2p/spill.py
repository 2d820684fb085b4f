"""Bytes that wait on disk instead of in memory: parts of a round until it is decided, large messages on their way.

Decides where they lie and when their room is used again. One file, which has no name, so that it ends with the process;
nothing in it is durable. What must survive is the chunk store's.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from pathlib import Path

from swarm.files import TEMPORARY_PREFIX, Kept, disk_errors

# Sizes that differ a little find each other's room: it has steps of a sixteenth of their power of two, a page at least.
_PAGE_BITS = 12
_STEP_BITS = 5


class Spill:
    """A file in ``folder``. What is no longer referred to makes room for what comes next. Safe to use from threads."""

    def __init__(self, folder: Path) -> None:
        with disk_errors(folder):
            self._descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
            os.unlink(name)
        weakref.finalize(self, os.close, self._descriptor)
        self._folder = folder
        self._lock = threading.Lock()
        self._end = 0
        self._free: dict[int, list[int]] = {}
        """room -> offsets; lists, as theirs are the operations that need no lock: a piece may be given up anywhere"""

    def put(self, data: bytes) -> Kept:
        """Keep ``data``. Raises `DiskFull`."""
        size = len(data)
        step_bits = max(_PAGE_BITS, size.bit_length() - _STEP_BITS)
        room = -(-size >> step_bits) << step_bits
        free = self._free.setdefault(room, [])
        try:
            offset = free.pop()
        except IndexError:
            with self._lock:
                offset, self._end = self._end, self._end + room
        piece = _Piece(self, offset, size)
        weakref.finalize(piece, free.append, offset).atexit = False
        done = 0
        with disk_errors(self._folder):
            while done < size:
                done += os.pwrite(self._descriptor, memoryview(data)[done:], offset + done)
        return piece

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)


class _Piece:
    def __init__(self, spill: Spill, offset: int, size: int) -> None:
        self._spill, self._offset, self._size = spill, offset, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice, /) -> bytes:
        first, last, _ = span.indices(self._size)
        return self._spill.read(self._offset + first, max(0, last - first))
