"""The coordinator's record put into a checkpoint before it is published: the record itself, and the card that tells it.

Decides which two files change. Every replica assembles the others alike (`peer.checkpoints.checkpoint`); only the seed
peer that publishes does this, and serves the two.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peer.checkpoints.card import model_card
from peer.checkpoints.checkpoint import CARD_NAME, CheckpointParts, card_facts, describe_file
from swarm import manifest as manifests
from swarm import run_record
from swarm.errors import ProtocolError
from swarm.files import write_durably
from swarm.manifest import CheckpointManifest
from swarm.run_record import RECORD_FILE


def add_record(folder: Path, parts: CheckpointParts, manifest: CheckpointManifest, raw: bytes) -> CheckpointManifest:
    """The manifest with the record and its card, which lie in ``folder`` then; the same where they do already.

    ``parts``: those of the run; what differs from round to round is the manifest's. Raises `VerificationError`,
    `ProtocolError` for the record of another round, `DiskFull`.
    """
    record = run_record.parse(raw)
    if record.round != manifest.round:
        raise ProtocolError(f"asked for the record of round {manifest.round}, got that of {record.round}")
    facts = replace(
        card_facts(parts),
        round=manifest.round,
        total_tokens=manifest.total_tokens,
        state_digest=manifest.state_digest,
        log_digest=manifest.log_digest,
        shards=manifest.shards,
        record=record,
    )
    for name, content in ((RECORD_FILE, raw), (CARD_NAME, model_card(facts).encode())):
        write_durably(folder / name, content)
    changed = [describe_file(folder / name) for name in (RECORD_FILE, CARD_NAME)]
    kept = [file for file in manifest.files if file.name not in (RECORD_FILE, CARD_NAME)]
    files = tuple(sorted([*kept, *changed], key=lambda file: file.name))
    made = manifest.model_copy(update={"files": files})
    write_durably(folder / manifests.MANIFEST_FILE, made.canonical_bytes())
    return made
