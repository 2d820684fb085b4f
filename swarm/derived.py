"""The bf16 set of a checkpoint: a pure function of its fp32 files, derived wherever these lie.

Decides which files differ, and their exact bytes: every value rounded to nearest, ties to even, the same tensors in
the same order in the same files. So any range of a derived file is that of twice the range of its origin, and nobody
keeps the set on disk to serve it. Decision 0022. Leaves digests to `swarm.manifest` and to whoever reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from swarm.errors import DataError
from swarm.file_ranges import FileRange, read_range
from swarm.manifest import CONFIG_NAME, FILE_CHUNK_BYTES, CheckpointFile, derived_names, list_file

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MAX_JSON_BYTES = 64 << 20
_LENGTH_BYTES = 8
_FP32_BYTES, _BF16_BYTES = 4, 2
_QUIET_NAN = 0x7FC0
_BLOCK_VALUES = 1 << 15  # what stays in the cache


class DerivedFile:
    """A file of the bf16 set: ``head`` as it is, then the values of ``origin`` from ``start`` on, rounded."""

    def __init__(self, head: bytes, origin: Path | None = None, start: int = 0, num_values: int = 0) -> None:
        self._head, self._origin, self._start = head, origin, start
        self.size_bytes = len(head) + _BF16_BYTES * num_values

    def read(self, offset: int, length: int) -> bytes | None:
        """The bytes from ``offset`` on; None where the origin is no longer long enough."""
        end = min(offset + length, self.size_bytes)
        head = self._head[offset:end]
        first, last = max(0, offset - len(self._head)), end - len(self._head)
        if self._origin is None or last <= first:
            return head
        from_value, to_value = first // _BF16_BYTES, -(-last // _BF16_BYTES)
        start, length = self._start + _FP32_BYTES * from_value, _FP32_BYTES * (to_value - from_value)
        values = read_range(FileRange(self._origin, start, length))
        if values is None:
            return None
        skipped = first - _BF16_BYTES * from_value
        return head + rounded(values)[skipped : skipped + last - first]

    def chunks(self) -> Iterator[bytes]:
        """Its bytes. Raises `DataError` where the origin is no longer long enough."""
        for offset in range(0, self.size_bytes, FILE_CHUNK_BYTES):
            chunk = self.read(offset, FILE_CHUNK_BYTES)
            if chunk is None:
                raise DataError(f"{self._origin} ends before its weights do")
            yield chunk


def derive(path: Path) -> DerivedFile:
    """The file of the bf16 set that is made of this one. Raises `DataError` where it is none of fp32, `OSError`."""
    try:
        if path.suffix == ".safetensors":
            return _weights(path)
        values = json.loads(_read(path, 0, min(path.stat().st_size, _MAX_JSON_BYTES)))
        if path.name == CONFIG_NAME:
            values["dtype"] = "bfloat16"
        else:
            values["metadata"]["total_size"] = values["metadata"]["total_size"] // 2
        return DerivedFile((json.dumps(values, sort_keys=True, indent=2) + "\n").encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"no bf16 set can be made of {path}: {error}", "it is not what a run publishes") from error


def describe_derived(folder: Path, files: Iterable[CheckpointFile]) -> tuple[CheckpointFile, ...]:
    """What a manifest lists of the bf16 set that the fp32 ``files`` in ``folder`` make.

    Raises `DataError`, `OSError`.
    """
    names = derived_names(file.name for file in files)
    return tuple(list_file(name, derive(folder / name).chunks()) for name in names)


def rounded(values: bytes) -> bytes:
    """Little-endian fp32 as bf16: to nearest, ties to even; what is too large becomes infinite, NaN stays NaN."""
    made = np.empty(len(values) // _FP32_BYTES, "<u2")
    for start in range(0, made.size, _BLOCK_VALUES):
        bits = np.frombuffer(values, "<u4")[start : start + _BLOCK_VALUES]
        nearest = (bits >> 16) & 1
        nearest += bits
        nearest += 0x7FFF  # of NaN alone this may overflow
        nearest >>= 16
        nearest[(bits & 0x7FFFFFFF) > 0x7F800000] = _QUIET_NAN
        made[start : start + _BLOCK_VALUES] = nearest
    return bytes(made.data)


def _weights(path: Path) -> DerivedFile:
    """Offsets are halved in the header, and everything else in it stays, so that the library would write the same."""
    length = int.from_bytes(_read(path, 0, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise DataError(f"{path} has a header of {length} bytes")
    entries = json.loads(_read(path, _LENGTH_BYTES, length))
    num_bytes = 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise DataError(f"{path} holds {name[:80]!r}, which is not fp32")
        num_bytes = max(num_bytes, entry["data_offsets"][1])
        entry["dtype"] = "BF16"
        entry["data_offsets"] = [offset // 2 for offset in entry["data_offsets"]]
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    head = len(header).to_bytes(_LENGTH_BYTES, "little") + header
    return DerivedFile(head, path, _LENGTH_BYTES + length, num_bytes // _FP32_BYTES)


def _read(path: Path, start: int, length: int) -> bytes:
    data = read_range(FileRange(path, start, length))
    if data is None:
        raise DataError(f"{path} is shorter than it says")
    return data
