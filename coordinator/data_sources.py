"""Reading documents from what an organizer has: text files, folders, JSON lines (plain or zstd), Parquet.

Decides what a document is, which files of a folder count and what is malformed. Memory is bounded: files are streamed,
so they may be larger than memory. Leaves the validation split, tokens and files on disk to `coordinator.data_prepare`.

One document is one text file (a long one is cut at line ends), one JSON line with a string ``text`` (the shape of
The Pile) or one Parquet row with a string column ``text``. Documents of white space only are left out.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from swarm.errors import DataError

DEFAULT_INCLUDE = (
    *("*.txt", "*.md", "*.rst", "*.tex", "*.py", "*.c", "*.h", "*.cpp", "*.hpp", "*.java", "*.js", "*.ts", "*.go"),
    *("*.rs", "*.jsonl", "*.jsonl.zst", "*.parquet"),
)
MAX_RECORD_BYTES = 64 << 20
MAX_PIECE_CHARACTERS = 64 << 10
MAX_EXAMPLES = 10
# zstd's own default for untrusted input: the memory that a frame may ask of its reader.
MAX_ZSTD_WINDOW_BYTES = 128 << 20
_BLOCK_BYTES = 1 << 20
# At best 4 compressed bytes become a 128 KiB block, so one feed makes at most 64 MiB.
_ZSTD_FEED_BYTES = 2048
_PARQUET_ROWS = 256


class Tally:
    """What reading has met so far: input bytes, and malformed documents (all counted, the first described)."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.bytes_read = 0
        self.malformed = 0
        self.examples: list[str] = []

    def reject(self, where: str, why: str) -> None:
        """Count a malformed document. Raises `DataError` where ``strict``."""
        if self.strict:
            raise DataError(f"{where}: {why}", "mend or remove it, or leave out --strict to skip and count it")
        self.malformed += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which files of a folder count: names that match one of ``include``; never what lies in ``exclude``."""

    include: tuple[str, ...] = DEFAULT_INCLUDE
    exclude: tuple[Path, ...] = ()


def files(source: Path, selection: Selection, tally: Tally) -> Iterator[Path]:
    """``source`` itself, or the matching files below it in sorted order; hidden files and symlinks are skipped."""
    if not source.is_dir():
        yield source
        return

    def unreadable(error: OSError) -> None:
        tally.reject(str(error.filename), f"cannot be read: {error.strerror}")

    for folder, subfolders, names in os.walk(source, onerror=unreadable):
        here = Path(folder)
        subfolders[:] = sorted(name for name in subfolders if _visible(here / name, selection))
        for name in sorted(names):
            matches = any(fnmatchcase(name.lower(), pattern.lower()) for pattern in selection.include)
            if matches and _visible(here / name, selection) and _is_plain_file(here / name):
                yield here / name


def size_bytes(source: Path, selection: Selection) -> int:
    """Bytes of all files that `documents` would read."""
    return sum(_size(path) for path in files(source, selection, Tally()))


def documents(source: Path, selection: Selection, tally: Tally) -> Iterator[str]:
    """The documents of ``source``, always in the same order. Raises `DataError` only through ``tally``."""
    for path in files(source, selection, tally):
        try:
            for text in _reader(path)(path, tally):
                if text and not text.isspace():
                    yield text
        except OSError as error:
            tally.reject(str(path), f"cannot be read: {error.strerror or error}")


def cut(text: str, limit: int = MAX_PIECE_CHARACTERS) -> Iterator[str]:
    """``text`` in pieces of at most ``limit`` characters, cut after a line end where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _reader(path: Path) -> Any:
    name = path.name.lower()
    if name.endswith(".jsonl"):
        return _json_lines
    if name.endswith(".jsonl.zst"):
        return _zstd_json_lines
    return _parquet if name.endswith(".parquet") else _text


def _visible(path: Path, selection: Selection) -> bool:
    return not path.name.startswith(".") and not path.is_symlink() and path.resolve() not in selection.exclude


def _is_plain_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _text(path: Path, tally: Tally) -> Iterator[str]:
    # Looked through once before anything of it is used: a binary file counts once, and none of it is trained on.
    try:
        for block in _decoded(path, Tally()):
            if "\0" in block:
                tally.reject(str(path), "binary (holds a NUL byte)")
                return
        pending = ""
        for block in _decoded(path, tally):
            # The last piece waits for what follows, so cuts do not depend on where blocks end.
            *whole, pending = tuple(cut(pending + block)) or ("",)
            yield from whole
        yield pending
    except UnicodeDecodeError:
        tally.reject(str(path), "not UTF-8 text")


def _decoded(path: Path, tally: Tally) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for block in _blocks(path, tally):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _blocks(path: Path, tally: Tally) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            tally.bytes_read += len(block)
            yield block


def _json_lines(path: Path, tally: Tally) -> Iterator[str]:
    return _texts_of_lines(path, _blocks(path, tally), tally)


def _zstd_json_lines(path: Path, tally: Tally) -> Iterator[str]:
    return _texts_of_lines(path, _decompressed(path, tally), tally)


def _texts_of_lines(path: Path, blocks: Iterable[bytes], tally: Tally) -> Iterator[str]:
    for number, line in _lines(blocks):
        if line is not None and not line.strip():
            continue
        text, why = _text_of_line(line)
        if why:
            tally.reject(f"{path}:{number}", why)
        else:
            yield text


def _lines(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Line number (from 1) and line; None for a line beyond `MAX_RECORD_BYTES`, of which nothing is kept."""
    number, parts, held = 1, [], 0
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for piece in ended:
            held += len(piece)
            parts.append(piece)
            yield number, (b"".join(parts) if held <= MAX_RECORD_BYTES else None)
            number, parts, held = number + 1, [], 0
        held += len(rest)
        parts = [*parts, rest] if held <= MAX_RECORD_BYTES else []
    if held:
        yield number, (b"".join(parts) if held <= MAX_RECORD_BYTES else None)


def _text_of_line(line: bytes | None) -> tuple[str, str]:
    """(text, why it is malformed or empty)."""
    if line is None:
        return "", f"longer than {MAX_RECORD_BYTES} bytes"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "", "not UTF-8"
    except (ValueError, RecursionError):
        return "", "not JSON"
    return _text_of_value(record.get("text") if isinstance(record, dict) else None)


def _text_of_value(value: object) -> tuple[str, str]:
    if not isinstance(value, str):
        return "", 'no string "text"'
    if len(value) > MAX_RECORD_BYTES:
        return "", f"longer than {MAX_RECORD_BYTES} characters"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "", "holds half a surrogate pair"
    return value, ""


def _decompressed(path: Path, tally: Tally) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    frame, fed = decompressor.decompressobj(), False
    try:
        for block in _blocks(path, tally):
            for start in range(0, len(block), _ZSTD_FEED_BYTES):
                waiting = block[start : start + _ZSTD_FEED_BYTES]
                while waiting:
                    yield frame.decompress(waiting)
                    waiting, fed = frame.unused_data, True
                    if frame.eof:
                        frame, fed = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        tally.reject(str(path), f"damaged zstd data, the rest is not read: {error}")
        return
    if fed:
        tally.reject(str(path), "the zstd data is cut short")


def _parquet(path: Path, tally: Tally) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row, size, counted = 0, _size(path), tally.bytes_read
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BLOCK_BYTES) as file:
            if "text" not in file.schema_arrow.names:
                tally.reject(str(path), 'has no column "text"')
                return
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=["text"]):
                for value in batch.column(0):
                    row += 1
                    text, why = _text_of_scalar(value)
                    if why:
                        tally.reject(f"{path}: row {row}", why)
                    else:
                        yield text
                # The position in the file is not known: progress goes by rows.
                tally.bytes_read = counted + size * row // max(1, file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        tally.reject(str(path), f"damaged Parquet after row {row}: {str(error)[:200]}")


def _text_of_scalar(scalar: Any) -> tuple[str, str]:
    try:
        return _text_of_value(scalar.as_py())
    except UnicodeDecodeError:
        return "", "not UTF-8"
