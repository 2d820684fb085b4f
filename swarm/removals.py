"""The removal list: documents that a run no longer trains on, each with its reason, from the round that it names on.

Decides the list's form, who may sign it (the organizer), and which sequences are left to read. All of it is a pure
function of the list and the round, so that everybody recomputes what a contribution should have seen. Leaves which of
what is left a peer reads to `swarm.assignment`, and finding documents to `coordinator.document_index`.

A removed document's tokens stay in the token shards, whose digests the run spec binds; sequences that hold any of them
are not read.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from pydantic import Field, model_validator

from swarm.data_manifest import DataManifest, Text
from swarm.errors import SpecError, VerificationError
from swarm.identity import verify
from swarm.proto.common_pb2 import Signed
from swarm.run_spec import Hex32, Section, parse_section

CONTEXT = "removals"
FILE_NAME = "removals.sig"
MAX_REMOVALS_BYTES = 4 << 20
MAX_REMOVALS = 10_000


class Removal(Section):
    """``start``: where the document's tokens begin, counted over all train token shards in their order."""

    document: Hex32
    reason: Text = Field(min_length=1)
    from_round: int = Field(ge=1)
    start: int = Field(ge=0, lt=1 << 62)
    num_tokens: int = Field(ge=1, lt=1 << 40)


class RemovalList(Section):
    """``version`` counts up: a reader never goes back to an older list. A newer one only adds."""

    format: Literal[1] = 1
    version: int = Field(ge=1)
    removals: tuple[Removal, ...] = Field(min_length=1, max_length=MAX_REMOVALS)

    @model_validator(mode="after")
    def _once_each(self) -> RemovalList:
        places = [(removal.document, removal.start) for removal in self.removals]
        if len(set(places)) != len(places):
            raise ValueError("a document is removed twice")
        return self

    def canonical_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()


def parse_signed(signed: Signed, run_id: bytes, organizer_key: bytes) -> RemovalList:
    """The list inside ``signed``, once the organizer of this run has signed it. Raises `VerificationError`."""
    raw = verify(signed, CONTEXT, run_id, organizer_key)
    if len(raw) > MAX_REMOVALS_BYTES:
        raise VerificationError(f"the removal list is larger than {MAX_REMOVALS_BYTES} bytes")
    try:
        found: RemovalList = parse_section(RemovalList, json.loads(raw), "removal list")
    except (ValueError, RecursionError, SpecError) as error:
        raise VerificationError(f"the removal list cannot be read: {error}") from error
    return found


def supersedes(new: RemovalList, old: RemovalList | None) -> bool:
    """Whether ``new`` takes the place of ``old``: a higher version that takes nothing back.

    Raises `VerificationError` where it does: rounds that were read without a document would change their meaning.
    """
    if old is None:
        return True
    if new.version > old.version and not set(old.removals) <= set(new.removals):
        raise VerificationError("a newer removal list takes a removal back", "tell the organizer")
    return new.version > old.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What may be read: ``counts`` of sequences by token shard, and ``kept`` of the shards that lost some."""

    counts: tuple[int, ...]
    kept: dict[int, tuple[int, ...]]

    def sequence(self, token_shard: int, index: int) -> int:
        """The sequence of a token shard that is the ``index``-th of those left."""
        kept = self.kept.get(token_shard)
        return index if kept is None else kept[index]


def left_to_read(manifest: DataManifest, sequence_length: int, removals: Sequence[Removal], round_number: int) -> Left:
    """The sequences that hold no token of a document that is removed in round ``round_number``.

    Sequence i of a token shard is its tokens [i*L, i*L + L + 1), as `swarm.assignment` says.
    """
    counts = [max(0, (shard.num_tokens - 1) // sequence_length) for shard in manifest.train]
    ends = list(accumulate(shard.num_tokens for shard in manifest.train))
    lost: dict[int, set[int]] = {}
    for removal in removals:
        if removal.from_round > round_number:
            continue
        start, end = removal.start, min(removal.start + removal.num_tokens, ends[-1])
        while start < end:
            shard = bisect_right(ends, start)
            first = ends[shard] - manifest.train[shard].num_tokens
            stop = min(end, ends[shard])
            # The last token of a sequence is the first of the next: one token may be in two.
            lowest = max(0, -(-(start - first - sequence_length) // sequence_length))
            highest = min(counts[shard] - 1, (stop - 1 - first) // sequence_length)
            lost.setdefault(shard, set()).update(range(lowest, highest + 1))
            start = stop
    kept = {shard: tuple(index for index in range(counts[shard]) if index not in gone) for shard, gone in lost.items()}
    for shard, sequences in kept.items():
        counts[shard] = len(sequences)
    return Left(counts=tuple(counts), kept=kept)
