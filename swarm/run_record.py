"""The record of a run at one checkpoint: who made it, on what, and what that took, as far as anybody can know.

Decides the record's form and limits. The coordinator writes it (it alone knows names and devices), the publication key
signs the manifest that lists it. Leaves estimates of energy to `swarm.energy` and the page for people to
`peer.checkpoints.card`.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from swarm.errors import SpecError, VerificationError
from swarm.run_spec import Section, parse_section

RECORD_FILE = "run-record.json"
MAX_RECORD_BYTES = 1 << 20
MAX_CONTRIBUTORS = 1000
MAX_NAME_CHARACTERS = 64
MAX_EVALUATIONS = 32

# Printable, and nothing that ends a table's cell or starts markup: what `swarm join --name` accepts.
NAME_PATTERN = r"^[^\x00-\x20\x7f|`<>\[\]][^\x00-\x1f\x7f|`<>\[\]]{0,63}$"
DisplayName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
ShortText = Annotated[str, StringConstraints(max_length=64)]


class Contributor(Section):
    """A volunteer who agreed to be named; ``tokens`` are those that the signed log credits."""

    name: DisplayName
    tokens: int = Field(ge=0)


class DeviceUse(Section):
    """Peers with the same device. ``training_s``: credited tokens over the tokens/s that they reported."""

    device: ShortText
    num_peers: int = Field(ge=1)
    training_s: float = Field(ge=0)
    watts: float = Field(ge=0)


class Energy(Section):
    """An estimate: see ``method``."""

    devices: tuple[DeviceUse, ...] = Field(max_length=MAX_CONTRIBUTORS)
    kwh: float = Field(ge=0)
    co2_kg: float = Field(ge=0)
    unknown_tokens: int = Field(ge=0)
    """credited to peers that reported no device or no believable speed: their energy is not in the sum"""
    method: str = Field(max_length=1024)


class RunRecord(Section):
    format: Literal[1] = 1
    round: int = Field(ge=1)
    num_peers: int = Field(ge=0)
    contributors: tuple[Contributor, ...] = Field((), max_length=MAX_CONTRIBUTORS)
    software: tuple[ShortText, ...] = Field((), max_length=MAX_CONTRIBUTORS)
    validation_loss: float | None = None
    energy: Energy
    evaluations: tuple[str, ...] = Field((), max_length=MAX_EVALUATIONS)
    """of earlier checkpoints, signed by whoever measured, as `swarm.evaluation.encode` writes them"""

    def canonical_bytes(self) -> bytes:
        left_out = set() if self.evaluations else {"evaluations"}  # as records were before there could be any
        return (json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True, indent=1) + "\n").encode()


def parse(raw: bytes) -> RunRecord:
    """Raises `VerificationError`."""
    if len(raw) > MAX_RECORD_BYTES:
        raise VerificationError(f"the run's record is larger than {MAX_RECORD_BYTES} bytes")
    try:
        record: RunRecord = parse_section(RunRecord, json.loads(raw), "the run's record")
    except (ValueError, RecursionError, SpecError) as error:
        raise VerificationError(f"the run's record cannot be read: {error}") from error
    return record
