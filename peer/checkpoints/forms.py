"""What a checkpoint's files may look like: safetensors without lies, configs without code.

Decides about bytes that are those which were signed; leaves digests and signatures to `peer.checkpoints.verify`.
"""

from __future__ import annotations

import json
import re
from typing import BinaryIO

from swarm.data_manifest import TOKENIZER_NAME
from swarm.derived import MAX_HEADER_BYTES
from swarm.manifest import MAX_MANIFEST_BYTES, CheckpointFile

_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\.safetensors")
# Where `transformers` reads which code to fetch and run.
_CODE = frozenset({"auto_map", "custom_pipelines"})
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def form_problems(file: BinaryIO, listed: CheckpointFile) -> list[str]:
    """What is wrong with a file whose bytes are those that were signed."""
    if listed.name.endswith(".safetensors"):
        return _safetensors_problems(file, listed)
    if listed.name.endswith(".json") and listed.name != TOKENIZER_NAME:
        return _json_problems(file, listed)
    return []


def header_problem(header: bytes, data_bytes: int) -> str | None:
    """What is wrong with a safetensors header in front of ``data_bytes`` of data; None where it is sound."""
    try:
        entries = json.loads(header, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        return "its header is not JSON, or names something twice"
    if not isinstance(entries, dict):
        return "its header is no table"
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        span = _span(entry)
        if span is None:
            return f"its header describes {name[:80]!r} wrongly"
        spans.append(span)
    position = 0
    for start, end in sorted(spans):
        if start != position:
            return "its tensors overlap or leave holes"
        position = end
    return None if position == data_bytes else "its tensors do not fill the file"


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _span(entry: object) -> tuple[int, int] | None:
    """Start and end of one tensor, when type, shape and offsets agree."""
    if not isinstance(entry, dict):
        return None
    item_bytes, shape, offsets = _ITEM_BYTES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    if item_bytes is None or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return None
    if len(shape) > 16 or any(type(number) is not int or number < 0 for number in (*shape, *offsets)):
        return None
    size_bytes = item_bytes
    for number in shape:
        size_bytes *= number
    return (offsets[0], offsets[1]) if offsets[1] - offsets[0] == size_bytes else None


def _safetensors_problems(file: BinaryIO, listed: CheckpointFile) -> list[str]:
    length = int.from_bytes(file.read(8), "little")
    if listed.size_bytes < 8 or length > min(MAX_HEADER_BYTES, listed.size_bytes - 8):
        return [f"{listed.name}: its header is longer than the file or than the format allows"]
    problem = header_problem(file.read(length), listed.size_bytes - 8 - length)
    return [f"{listed.name}: {problem}"] if problem else []


def _json_problems(file: BinaryIO, listed: CheckpointFile) -> list[str]:
    """Configs must not name code, and an index must not name files outside the folder."""
    if listed.size_bytes > MAX_MANIFEST_BYTES:
        return [f"{listed.name} is too large for a config"]
    try:
        values = json.loads(file.read())
    except (ValueError, RecursionError):
        return [f"{listed.name} is not JSON"]
    if not isinstance(values, dict):
        return [f"{listed.name} is no table"]
    asked = _CODE & values.keys()
    if asked:
        return [f"{listed.name} asks for code of its own ({', '.join(sorted(asked))})"]
    weight_map = values.get("weight_map", {})
    if not isinstance(weight_map, dict) or any(not _PLAIN_NAME.fullmatch(str(name)) for name in weight_map.values()):
        return [f"{listed.name} names files outside the checkpoint"]
    return []
