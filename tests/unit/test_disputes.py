"""False averages: what is written down of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peer.rounds import disputes
from peer.rounds.disputes import false_averages, write_down
from swarm.proto.round_pb2 import PartResult, Record


def test_false_averages_are_written_down_until_the_file_is_large_and_told_beyond_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(round=7, parts=[PartResult(digest=b"d" * 32, reducer=b"r" * 32, signature=b"s" * 64)])
    found = false_averages(record, None, list(record.parts))
    assert len(write_down(tmp_path, found)) == 1
    size_bytes = (tmp_path / "incidents").stat().st_size
    monkeypatch.setattr(disputes, "MAX_INCIDENTS_BYTES", 2 * size_bytes)
    for _ in range(5):
        (told,) = write_down(tmp_path, found)
        assert "round 7" in told
    lines = (tmp_path / "incidents").read_text().splitlines()
    assert [json.loads(line)["signature"] for line in lines] == [(b"s" * 64).hex()] * 2
