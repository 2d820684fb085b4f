"""What a commit says that is not so: of a part, of our contribution to it, or of an average that cannot be one.

Decides what is held against a reducer, which signed it (docs/protocol.md). Leaves to `peer.rounds.shard` that averages
that are too long move nothing, and to people what becomes of the reducer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peer.rounds.attempt import Attempt
from peer.rounds.mending import incidents_bytes, record_incident
from peer.rounds.paxos import ballot_of
from swarm.averages import payload
from swarm.identity import peer_id_of
from swarm.proto.round_pb2 import PartResult, Record

MAX_INCIDENTS_BYTES = 16 << 20  # a whole record's worth is half a megabyte

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAverage:
    """Somebody signed what cannot be: ``signed`` and ``signature`` (hex) prove who."""

    at_unix_s: int
    shard: int
    round: int
    reducer: str
    why: str
    signed: str
    signature: str

    def __str__(self) -> str:
        return f"round {self.round}: {self.why}; {self.reducer} signed that"


def false_averages(record: Record, attempt: Attempt | None, too_long: Sequence[PartResult]) -> list[FalseAverage]:
    """What of ``record`` is false, as far as this replica can see. ``too_long``: parts that therefore moved nothing."""
    found = [(part, "an average is longer than its contributions can make it") for part in too_long]
    if attempt is not None and attempt.ballot == ballot_of(record.opened_by):
        for index, part in enumerate(record.parts):
            lie = attempt.lie_about(index, part) if part.digest else None
            if lie is not None:
                found.append((part, lie))
    return [
        FalseAverage(
            at_unix_s=int(time.time()),
            shard=record.shard,
            round=record.round,
            reducer=peer_id_of(part.reducer),
            why=why,
            signed=payload(record, part).hex(),
            signature=part.signature.hex(),
        )
        for part, why in found
    ]


def write_down(folder: Path, found: Sequence[FalseAverage]) -> tuple[str, ...]:
    """Into the file of incidents, durably; gives what to tell a person.

    Nothing more goes into a large file: a liar must not fill a disk, and whoever replays a round finds it anew.
    """
    for false in found:
        log.error("incident: %s", false)
        if incidents_bytes(folder) < MAX_INCIDENTS_BYTES:
            record_incident(folder, asdict(false))
    return tuple(map(str, found))
