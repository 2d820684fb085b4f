"""What a run has published, as a mirror tells it: rounds by the run's metadata, and what their own files say of them.

Decides how much is read of how many checkpoints (manifest and run record of the newest), and that each file has the
digest that metadata or manifest name. Leaves the metadata to `peer.checkpoints.mirrored`. What only a coordinator knows
is not here: when a checkpoint was published, and evaluations that no later record carries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peer.checkpoints.mirrored import Mirror, read_file, trusted_by
from swarm import digest, evaluation, manifest, run_record
from swarm.errors import NotFound, VerificationError
from swarm.evaluation import SignedEvaluation
from swarm.manifest import CheckpointManifest, mirror_folder
from swarm.metadata import Entry
from swarm.run_record import RECORD_FILE, RunRecord
from swarm.run_spec import RunSpec

MAX_READ = 64  # checkpoints; of older ones only the digest is told
_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A published checkpoint; ``manifest`` and ``record`` None: not read, or not to be had there."""

    entry: Entry
    manifest: CheckpointManifest | None = None
    record: RunRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """``checkpoints``: newest first."""

    spec: RunSpec
    checkpoints: tuple[Listed, ...]

    def evaluations(self, manifest_digest: bytes) -> list[SignedEvaluation]:
        """What records carry of this very checkpoint, each once."""
        texts = dict.fromkeys(text for item in self.checkpoints if item.record for text in item.record.evaluations)
        found = []
        for text in texts:
            with suppress(VerificationError):
                found.append(evaluation.decode(text, self.spec.run_id))
        return [item for item in found if item.evaluation.manifest_digest == manifest_digest.hex()]


async def read_listing(mirror: Mirror, folder: Path, run_id: bytes) -> Listing:
    """What ``mirror`` has, by metadata that ``folder`` then trusts.

    Raises `NetworkError` where it cannot be read, `NotFound` where it lacks metadata, `VerificationError`.
    """
    _, known = await trusted_by(mirror, folder, run_id)
    entries: Sequence[Entry] = [known.checkpoints[number] for number in sorted(known.checkpoints, reverse=True)]
    room = asyncio.Semaphore(_AT_ONCE)

    async def read(entry: Entry) -> Listed:
        async with room:
            return await _read(mirror, entry)

    newest = await asyncio.gather(*(read(entry) for entry in entries[:MAX_READ]))
    return Listing(spec=known.spec, checkpoints=(*newest, *(Listed(entry=entry) for entry in entries[MAX_READ:])))


async def _read(mirror: Mirror, entry: Entry) -> Listed:
    base = mirror_folder(entry.round)
    try:
        raw = await read_file(mirror, f"{base}/{manifest.MANIFEST_FILE}", entry.manifest_bytes)
    except NotFound:
        return Listed(entry=entry)
    digest.check(raw, entry.manifest_digest, f"{base}/{manifest.MANIFEST_FILE} of a mirror")
    parsed = manifest.parse(raw)
    listed = next((file for file in parsed.files if file.name == RECORD_FILE), None)
    if listed is None or listed.size_bytes > run_record.MAX_RECORD_BYTES:
        return Listed(entry=entry, manifest=parsed)
    try:
        raw = await read_file(mirror, f"{base}/{RECORD_FILE}", listed.size_bytes)
    except NotFound:
        return Listed(entry=entry, manifest=parsed)
    digest.check(raw, bytes.fromhex(listed.sha256), f"{base}/{RECORD_FILE} of a mirror")
    return Listed(entry=entry, manifest=parsed, record=run_record.parse(raw))
