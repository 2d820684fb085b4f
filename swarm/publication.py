"""A checkpoint as it is published: what is signed about it, and by whose authority.

Decides which publication key may have signed it (the run spec's, or the one that the organizers' roots lead to; of one
that they replaced only what the new one lists), and that manifest, witnesses and roots belong together. The files
themselves are `peer.checkpoints.verify`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError

from swarm import digest, governance, manifest, witness
from swarm.errors import ProtocolError, SignatureError, VerificationError
from swarm.identity import verify
from swarm.manifest import CheckpointManifest
from swarm.metadata import Entry
from swarm.proto.checkpoint_pb2 import Roots
from swarm.proto.common_pb2 import Signed
from swarm.run_spec import RunSpec

ROOTS_CONTEXT = "roots"
MAX_ROOTS_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is trusted of a run already: roots, and by round the checkpoints that the key of the newest one lists."""

    roots: tuple[bytes, ...] = ()
    checkpoints: Mapping[int, Entry] = field(default_factory=dict)


NOTHING_KNOWN = Known()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Manifest and witnesses, and the roots where the organizers changed keys; the publication key signed each."""

    manifest: Signed
    witnesses: Signed
    roots: Signed | None = None

    def verified(self, run_id: bytes, spec: RunSpec, known: Known = NOTHING_KNOWN) -> CheckpointManifest:
        """The manifest, once a publication key signed it and a quorum of replicas witnessed its state.

        A key that organizers replaced vouches only for what the new one lists too: ``known`` names this very manifest.
        """
        own = parse_roots(self.roots, run_id, spec)
        shared = min(len(own), len(known.roots))
        if list(own[:shared]) != list(known.roots[:shared]):
            raise VerificationError("the checkpoint's roots are not those that are trusted on this machine")
        key = governance.publication_key(run_id, spec, own)
        checkpoint = manifest.parse_signed(self.manifest, run_id, key)
        newest_key = governance.publication_key(run_id, spec, max(own, known.roots, key=len))
        if key != newest_key and known.checkpoints.get(checkpoint.round) != self.entry(checkpoint.round):
            raise SignatureError(
                "the checkpoint is signed by a key that the organizers replaced, and the new key does not list it",
                "bring the list up to date (swarm checkpoints INVITE): a checkpoint that is not in it is not the run's",
            )
        witnesses = witness.parse_witnesses(self.witnesses, run_id, key)
        if witnesses.manifest_digest != digest.sha256(self.manifest.payload):
            raise VerificationError("the witnesses are those of another manifest")
        witness.check_quorum(witnesses, run_id, spec.checkpoints, checkpoint)
        return checkpoint

    def entry(self, round_number: int) -> Entry:
        """How metadata lists what is published of this round."""
        return Entry(
            round=round_number,
            manifest_bytes=len(self.manifest.payload),
            manifest_digest=digest.sha256(self.manifest.payload),
            witnesses_digest=digest.sha256(self.witnesses.payload),
        )


def published_manifest(folder: Path, run_id: bytes, spec: RunSpec) -> CheckpointManifest:
    """The manifest in a checkpoint's folder on this machine, once the key that its own roots lead to signed it.

    Whether organizers replaced that key later, and who witnessed, is not asked. Raises `OSError`, too.
    """
    path = folder / manifest.ROOTS_FILE
    try:
        roots = parse_roots(Signed.FromString(path.read_bytes()) if path.exists() else None, run_id, spec)
        signed = Signed.FromString((folder / manifest.SIGNATURE_FILE).read_bytes())
    except DecodeError as error:
        raise ProtocolError(f"a signature in {folder} cannot be read") from error
    return manifest.parse_signed(signed, run_id, governance.publication_key(run_id, spec, roots))


def parse_roots(signed: Signed | None, run_id: bytes, spec: RunSpec) -> tuple[bytes, ...]:
    """The roots inside ``signed``, once they prove themselves and the key that they lead to signed them."""
    if signed is None:
        return ()
    if len(signed.payload) > MAX_ROOTS_BYTES:
        raise ProtocolError(f"roots of {len(signed.payload)} bytes are too large")
    try:
        roots = tuple(Roots.FromString(signed.payload).roots)
    except DecodeError as error:
        raise ProtocolError("the roots cannot be read") from error
    verify(signed, ROOTS_CONTEXT, run_id, governance.publication_key(run_id, spec, roots))
    return roots
