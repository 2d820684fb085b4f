"""Evaluations beside a checkpoint: written with the signature of whoever measured, and found again to be told.

Decides the two files of each; `peer.checkpoints.facts` checks what lies there, `swarm.evaluation` says what they hold.
"""

from __future__ import annotations

from pathlib import Path

from peer.checkpoints.facts import read_evaluations
from peer.checkpoints.verify import Provenance
from swarm import evaluation
from swarm.evaluation import Evaluation
from swarm.files import disk_errors, write_durably
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed


def record(folder: Path, made: Evaluation, signer: Identity) -> tuple[Path, Signed]:
    """Write ``evaluations/NAME.json`` and ``NAME.sig`` into the checkpoint; the first path, and what was signed.

    Raises `DiskFull`.
    """
    signed = signer.sign(evaluation.CONTEXT, bytes.fromhex(made.run_id), made.canonical_bytes())
    target = folder / evaluation.FOLDER
    with disk_errors(target):
        target.mkdir(exist_ok=True)
        write_durably(target / f"{made.name}.json", signed.payload)
        write_durably(target / f"{made.name}.sig", signed.SerializeToString(deterministic=True))
    return target / f"{made.name}.json", signed


def recorded(folder: Path, provenance: Provenance) -> list[Signed]:
    """What lies beside the checkpoint and is of it, as signed."""
    found, _ = read_evaluations(folder, provenance)
    return [Signed.FromString((folder / evaluation.FOLDER / f"{item.name}.sig").read_bytes()) for item in found]
