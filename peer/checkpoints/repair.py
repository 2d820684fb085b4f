"""Repair: a checkpoint folder whose bytes went bad is made whole in place; only the chunks that are bad are fetched.

Decides that the signed manifest alone says what is right, and that a file which is in no list is never touched. Leaves
filling to `peer.checkpoints.filling` and judging to `peer.checkpoints.verify`.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from peer.checkpoints.checkpoint import write_signed
from peer.checkpoints.download import locked
from peer.checkpoints.filling import Fetching, fill
from peer.checkpoints.sets import held_set, set_beside
from peer.checkpoints.verify import Provenance, Report, verify_folder
from swarm import manifest as manifests
from swarm.errors import SwarmError
from swarm.files import disk_errors
from swarm.manifest import BF16


async def repair(folder: Path, provenance: Provenance, fetching: Fetching) -> Report:
    """Make ``folder`` the checkpoint that ``provenance`` (verified by the caller) describes; what is wrong still.

    Raises `NotFound` (run it again: it resumes), `AlreadyRunning`, `DiskFull`, `ConfigError` (a link in the way).
    """
    manifest = provenance.manifest
    with locked(folder), disk_errors(folder):
        held = held_set(folder, manifest)
        await fill(folder, held, (), fetching)
        beside = set_beside(folder, held, manifest)
        if beside is not None:
            await fill(folder / BF16, beside, [(folder, manifest)], fetching)  # made of what is right by now
        return await asyncio.to_thread(_finish, folder, provenance)


def _finish(folder: Path, provenance: Provenance) -> Report:
    held = held_set(folder, provenance.manifest)
    beside = set_beside(folder, held, provenance.manifest)
    paths = [folder / file.name for file in held.files]
    paths += [folder / BF16 / file.name for file in beside.files] if beside is not None else []
    for path in paths:
        with open(path, "rb") as written:
            os.fsync(written.fileno())
    write_signed(folder, provenance.publication, provenance.signed_spec)
    return verify_folder(folder, provenance.run_id)


def round_in(folder: Path) -> int:
    """The round that the folder's manifest names, though nothing may be right about it; 0 where it names none.

    Good for asking for the signed manifest of that round, and for nothing else.
    """
    try:
        with open(folder / manifests.MANIFEST_FILE, "rb") as file:
            return manifests.parse(file.read(manifests.MAX_MANIFEST_BYTES + 1)).round
    except (OSError, SwarmError):
        return 0
