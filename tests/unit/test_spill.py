"""Bytes that wait on disk: as they were, in room that is used again, and no file left behind."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peer.p2p.spill import Spill
from swarm.errors import DiskFull


def test_what_was_put_is_read_back_whole_and_in_pieces(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    data = os.urandom(200_000)
    first, second = spill.put(data), spill.put(b"")
    assert (len(first), first[:], first[10:20], first[199_990:300_000]) == (200_000, data, data[10:20], data[-10:])
    assert (len(second), second[:]) == (0, b"")
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_room_is_used_again_once_nobody_refers_to_it(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    kept = spill.put(b"k" * 70_000)
    for number in range(100):
        piece = spill.put(bytes([number]) * (70_000 + number))  # a little larger each time
        assert piece[:1] == bytes([number])
        del piece
    assert os.fstat(spill._descriptor).st_size <= 4 * 70_000 and kept[:] == b"k" * 70_000


@pytest.mark.parametrize("size", [16_640, 70_000, 2_129_920])
def test_room_is_little_more_than_what_lies_in_it(tmp_path: Path, size: int) -> None:
    """A slice's debt as well as a part of a large shard."""
    spill = Spill(tmp_path)
    pieces = [spill.put(bytes(size)) for _ in range(10)]
    assert 10 * size <= os.fstat(spill._descriptor).st_size <= 1.25 * 10 * size and len(pieces) == 10


def test_threads_do_not_share_room(tmp_path: Path) -> None:
    spill = Spill(tmp_path)

    def use(number: int) -> bool:
        data = bytes([number]) * 50_000
        return all(spill.put(data)[:] == data for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(8)))


def test_a_piece_outlives_the_one_who_made_its_spill(tmp_path: Path) -> None:
    piece = Spill(tmp_path).put(b"still here")
    assert piece[:] == b"still here"


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    spill = Spill(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull):
        spill.put(b"data")
