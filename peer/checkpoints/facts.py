"""What a checkpoint folder says of itself, once its signatures are right: the facts of its card, and its lineage.

Decides which files are read, and that each has the digest that the manifest lists. Leaves the bytes of the weights to
`peer.checkpoints.verify`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from peer.checkpoints.card import CardFacts
from peer.checkpoints.verify import KnownOf, Provenance, knows_nothing, open_regular, read_provenance
from peer.checkpoints.weights import Weights
from swarm import data_manifest, digest, evaluation, manifest, run_record
from swarm.errors import DataError, SwarmError, VerificationError
from swarm.evaluation import SignedEvaluation
from swarm.identity import peer_id_of
from swarm.proto.common_pb2 import Signed

MAX_EVALUATIONS = 1000
_MAX_SIGNED_BYTES = evaluation.MAX_EVALUATION_BYTES + 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """``ignored``: evaluations that lie there and are not what they claim, each with the reason."""

    folder: Path
    provenance: Provenance
    card: CardFacts
    evaluations: tuple[SignedEvaluation, ...]
    ignored: tuple[str, ...]

    def lineage(self) -> dict[str, Any]:
        """Where the checkpoint comes from, as plain values."""
        spec, listed = self.provenance.spec, self.provenance.manifest
        data, record = self.card.data, self.card.record
        base = spec.base.model_dump(mode="json") if spec.base is not None else None
        return {
            "folder": str(self.folder),
            "run": {"name": spec.name, "id": self.provenance.run_id.hex(), "family": spec.model.family},
            "genesis": {"seed": spec.seed, "base": base},
            "round": listed.round,
            "total_tokens": listed.total_tokens,
            "planned_tokens": spec.total_tokens,
            "state_digest": listed.state_digest,
            "log_digest": listed.log_digest,
            "num_parameters": self.card.num_parameters,
            "data": {
                "manifest_digest": spec.data.manifest_digest,
                "tokenizer_digest": data.tokenizer_digest,
                "train_tokens": data.train_tokens,
                "validation_tokens": data.validation_tokens,
                "filters": list(data.filters),
                "sources": [source.model_dump(mode="json") for source in data.sources],
            },
            "licence": spec.checkpoints.licence,
            "record": record.model_dump(mode="json") if record is not None else None,
            "signed_by": {
                "organizer_key": spec.organizer_key,
                "publication_key": self.provenance.publication.manifest.signer.hex(),
                "witnesses": list(self.provenance.witnesses),
                "replicas": self.provenance.num_live,
                "manifest_digest": manifest_digest(self.provenance),
            },
            "evaluations": [
                {"name": item.evaluation.name, "asked": list(item.evaluation.asked), "signer": peer_id_of(item.signer)}
                for item in self.evaluations
            ],
            "ignored": list(self.ignored),
        }


def manifest_digest(provenance: Provenance) -> str:
    """SHA-256 of the manifest as signed: the name of this very checkpoint."""
    return digest.sha256(provenance.publication.manifest.payload).hex()


def read_facts(folder: Path, run_id: bytes | None, known_of: KnownOf = knows_nothing) -> FolderFacts:
    """Raises `DataError` where this is no checkpoint, `VerificationError` where what is read is not what was signed."""
    provenance = read_provenance(folder, run_id, known_of)
    listed, spec = provenance.manifest, provenance.spec
    raw_data = _listed(folder, provenance, manifest.DATA_FILE, data_manifest.MAX_MANIFEST_BYTES)
    if raw_data is None:
        raise DataError(
            f"{folder} does not hold its data manifest", "it was made by an older version; use a newer round"
        )
    raw_record = _listed(folder, provenance, run_record.RECORD_FILE, run_record.MAX_RECORD_BYTES)
    found, ignored = read_evaluations(folder, provenance)
    card = CardFacts(
        run_id=provenance.run_id,
        spec=spec,
        data=data_manifest.parse(raw_data, spec.data.manifest_digest),
        round=listed.round,
        total_tokens=listed.total_tokens,
        state_digest=listed.state_digest,
        log_digest=listed.log_digest,
        shards=listed.shards,
        num_parameters=Weights(folder, listed).num_parameters,
        record=run_record.parse(raw_record) if raw_record is not None else None,
        evaluations=found,
    )
    return FolderFacts(folder=folder, provenance=provenance, card=card, evaluations=found, ignored=ignored)


def read_evaluations(folder: Path, provenance: Provenance) -> tuple[tuple[SignedEvaluation, ...], tuple[str, ...]]:
    """Evaluations of this very checkpoint, in the order of their names; and what lies there and is none."""
    found: list[SignedEvaluation] = []
    ignored: list[str] = []
    for path in sorted((folder / evaluation.FOLDER).glob("*.sig"))[:MAX_EVALUATIONS]:
        try:
            found.append(_read_evaluation(path, provenance))
        except (OSError, DecodeError, SwarmError) as error:
            ignored.append(f"{path.name}: {error}")
    return tuple(found), tuple(ignored)


def _read_evaluation(path: Path, provenance: Provenance) -> SignedEvaluation:
    signed = Signed.FromString(_read_beside(path))
    parsed = evaluation.parse_signed(signed, provenance.run_id)
    if parsed.manifest_digest != manifest_digest(provenance):
        raise VerificationError("it is of another checkpoint")
    readable = path.with_suffix(".json")
    if os.path.lexists(readable) and _read_beside(readable) != signed.payload:
        raise VerificationError(f"{readable.name} is not what was signed")
    return SignedEvaluation(name=path.stem, evaluation=parsed, signer=signed.signer)


def _read_beside(path: Path) -> bytes:
    with open_regular(path) as file:
        raw = file.read(_MAX_SIGNED_BYTES + 1)
    if len(raw) > _MAX_SIGNED_BYTES:
        raise VerificationError("larger than an evaluation may be")
    return raw


def _listed(folder: Path, provenance: Provenance, name: str, max_bytes: int) -> bytes | None:
    """The bytes of a file that the manifest lists, with the digest that it lists; None where it lists none."""
    listed = next((file for file in provenance.manifest.files if file.name == name), None)
    if listed is None:
        return None
    if listed.size_bytes > max_bytes:
        raise VerificationError(f"{name} is larger than {max_bytes} bytes")
    path = folder / name
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "download the checkpoint again") from error
    digest.check(raw, bytes.fromhex(listed.sha256), name)
    return raw
