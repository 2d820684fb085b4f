"""Reading documents: what counts, in which order, and what is malformed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from coordinator import data_sources
from coordinator.data_sources import Selection, Tally, cut, documents, files, size_bytes
from swarm.errors import DataError


def read(source: Path, **selection: object) -> tuple[list[str], Tally]:
    tally = Tally()
    return list(documents(source, Selection(**selection), tally)), tally  # type: ignore[arg-type]


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text, "meta": {"pile_set_name": "x"}}).encode() + b"\n" for text in texts)


def parquet(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path)


def test_a_folder_is_walked_in_sorted_order_without_hidden_files_links_and_other_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.PY", ".hidden.txt", ".git/x.txt", "picture.png", "__pycache__/x.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    texts, tally = read(tmp_path)
    assert texts == ["b.txt", "a/z.md", "a/b/c.PY"]
    assert tally.malformed == 0
    assert tally.bytes_read == size_bytes(tmp_path, Selection()) == sum(len(text) for text in texts)


def test_include_chooses_files_and_exclude_is_never_entered(tmp_path: Path) -> None:
    for name in ("a.txt", "b.log", "out/c.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    selection = Selection(include=("*.log",), exclude=((tmp_path / "out").resolve(),))
    assert list(files(tmp_path, selection, Tally())) == [tmp_path / "b.log"]


def test_a_named_file_of_any_name_is_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / ".notes"
    path.write_bytes(b"\xef\xbb\xbfhello\r\nworld")
    assert read(path)[0] == ["hello\r\nworld"]


def test_json_lines_give_their_text_and_blank_ones_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines("one", "zwei\n", "  \n") + b"\n   \n" + lines("drei").rstrip(b"\n"))
    texts, tally = read(path)
    assert texts == ["one", "zwei\n", "drei"]
    assert tally.malformed == 0


def test_zstd_json_lines_of_several_frames_are_read_to_the_end(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor()
    many = [f"document {index} " * 50 for index in range(500)]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(compressor.compress(lines(*many[:250])) + compressor.compress(lines(*many[250:])))
    texts, tally = read(path)
    assert texts == many
    assert (tally.malformed, tally.bytes_read) == (0, path.stat().st_size)


def test_parquet_rows_give_their_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    many = [f"row {index}" for index in range(700)]
    parquet(path, text=many, other=list(range(700)))
    texts, tally = read(path)
    assert texts == many
    assert (tally.malformed, tally.bytes_read) == (0, path.stat().st_size)


def _zstd(data: bytes, drop: int = 0) -> bytes:
    whole = zstandard.ZstdCompressor().compress(data)
    return whole[: len(whole) - drop]


BAD_FILES: dict[str, tuple[str, bytes, list[str], list[str]]] = {
    # name: file name, bytes, good documents, what is said
    "NUL byte": ("x.txt", b"good\0bad", [], ["x.txt: binary"]),
    "not UTF-8 text": ("x.txt", b"good \xff", [], ["x.txt: not UTF-8"]),
    "text cut in a character": ("x.txt", "ä".encode()[:1], [], ["x.txt: not UTF-8"]),
    "not JSON": ("x.jsonl", b"{oops\n" + lines("good"), ["good"], ["x.jsonl:1: not JSON"]),
    "JSON too deep": ("x.jsonl", lines("good") + b"[" * 100_000, ["good"], ["x.jsonl:2: not JSON"]),
    "a list": ("x.jsonl", b'["text"]\n', [], ['x.jsonl:1: no string "text"']),
    "no text": ("x.jsonl", b'{"meta": {}}\n', [], ['x.jsonl:1: no string "text"']),
    "text of a wrong type": ("x.jsonl", b'{"text": 3}\n', [], ['x.jsonl:1: no string "text"']),
    "line not UTF-8": ("x.jsonl", b'{"text": "\xff"}\n', [], ["x.jsonl:1: not UTF-8"]),
    "UTF-16 line": ("x.jsonl", '{"text": "x"}'.encode("utf-16"), [], ["x.jsonl:1: not UTF-8"]),
    "half a surrogate pair": ("x.jsonl", b'{"text": "\\ud800"}\n', [], ["x.jsonl:1: holds half a surrogate"]),
    "not zstd": ("x.jsonl.zst", b"plain text", [], ["x.jsonl.zst: damaged zstd"]),
    "garbage after zstd": ("x.jsonl.zst", _zstd(lines("good")) + b"garbage", ["good"], ["x.jsonl.zst: damaged zstd"]),
    "zstd cut short": ("x.jsonl.zst", _zstd(lines("good" * 99), 4), [], ["x.jsonl.zst: the zstd data is cut short"]),
    "not Parquet": ("x.parquet", b"plain text" * 9, [], ["x.parquet: damaged Parquet"]),
    "empty Parquet file": ("x.parquet", b"", [], ["x.parquet: damaged Parquet"]),
}


@pytest.mark.parametrize("case", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_malformed_input_is_counted_and_described_and_the_rest_is_read(
    case: tuple[str, bytes, list[str], list[str]], tmp_path: Path
) -> None:
    name, raw, good, said = case
    (tmp_path / name).write_bytes(raw)
    texts, tally = read(tmp_path / name)
    assert texts == good
    assert tally.malformed == len(said)
    for example, expected in zip(tally.examples, said, strict=True):
        assert expected in example


@pytest.mark.parametrize("case", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_strict_refuses_at_the_first_malformed_document(
    case: tuple[str, bytes, list[str], list[str]], tmp_path: Path
) -> None:
    (tmp_path / case[0]).write_bytes(case[1])
    with pytest.raises(DataError, match=case[0]) as caught:
        list(documents(tmp_path / case[0], Selection(), Tally(strict=True)))
    assert "--strict" in caught.value.advice


def test_parquet_without_a_string_column_text_is_malformed(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", content=["x"])
    parquet(tmp_path / "b.parquet", text=[1, 2])
    parquet(tmp_path / "c.parquet", text=["good", None])
    texts, tally = read(tmp_path)
    assert texts == ["good"]
    assert [example.partition(str(tmp_path))[2] for example in tally.examples] == [
        '/a.parquet: has no column "text"',
        '/b.parquet: row 1: no string "text"',
        '/b.parquet: row 2: no string "text"',
        '/c.parquet: row 2: no string "text"',
    ]


def test_all_malformed_lines_are_counted_and_the_first_ten_described(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"oops\n" * 25)
    tally = read(path)[1]
    assert tally.malformed == 25
    assert [example.split(":")[1] for example in tally.examples] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("write", [lambda raw: raw, zstandard.ZstdCompressor().compress], ids=["plain", "zstd"])
def test_a_line_beyond_the_limit_is_skipped_and_reading_goes_on(
    write: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_sources, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / ("x.jsonl" if write(b"") == b"" else "x.jsonl.zst")
    path.write_bytes(write(lines("before", "x" * 3_000_000, "after") + b"y" * 3_000_000))
    texts, tally = read(path)
    assert texts == ["before", "after"]
    assert [example.rsplit("x.jsonl", 1)[1] for example in tally.examples] == [
        f"{'' if path.suffix == '.jsonl' else '.zst'}:{number}: longer than 1000 bytes" for number in (2, 4)
    ]


def test_a_file_that_cannot_be_opened_is_malformed(tmp_path: Path) -> None:
    texts, tally = read(tmp_path / "gone.txt")
    assert texts == []
    assert tally.examples == [f"{tmp_path}/gone.txt: cannot be read: No such file or directory"]


def test_a_long_text_file_is_cut_at_line_ends_the_same_way_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"línea número {index}\n" * (index % 7) for index in range(5000))
    path = tmp_path / "x.txt"
    path.write_text(text)
    expected = list(cut(text))
    assert len(expected) > 3
    for block_bytes in (1 << 20, 9973):
        monkeypatch.setattr(data_sources, "_BLOCK_BYTES", block_bytes)
        assert read(path)[0] == expected


@given(st.text(alphabet="ab\n", max_size=200), st.integers(1, 20))
def test_cut_pieces_are_short_and_join_to_the_text(text: str, limit: int) -> None:
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert all(piece.endswith("\n") or "\n" not in piece for piece in pieces[:-1])
