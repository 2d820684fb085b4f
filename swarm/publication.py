"""A checkpoint as it is published: what is signed about it, and by whose authority.

Decides which publication key may have signed it (the run spec's, or the one that the organizers' roots lead to), and
that manifest, witnesses and roots belong together. The files themselves are `peer.checkpoints.verify`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from swarm import digest, governance, manifest, witness
from swarm.errors import ProtocolError, SignatureError, VerificationError
from swarm.identity import verify
from swarm.manifest import CheckpointManifest
from swarm.proto.checkpoint_pb2 import Roots
from swarm.proto.common_pb2 import Signed
from swarm.run_spec import RunSpec

ROOTS_CONTEXT = "roots"
MAX_ROOTS_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Manifest and witnesses, and the roots where the organizers changed keys; the publication key signed each."""

    manifest: Signed
    witnesses: Signed
    roots: Signed | None = None

    def verified(self, run_id: bytes, spec: RunSpec, known_roots: Sequence[bytes] = ()) -> CheckpointManifest:
        """The manifest, once the publication key signed it and a quorum of replicas witnessed its state.

        ``known_roots``: roots that are trusted already; a key that they have replaced is refused.
        """
        key = self._publication_key(run_id, spec, known_roots)
        if self.manifest.signer != key and known_roots:
            raise SignatureError(
                "the checkpoint is signed by another key than the organizers' newest root names",
                "download it again: what is still vouched for has new signatures",
            )
        checkpoint = manifest.parse_signed(self.manifest, run_id, key)
        witnesses = witness.parse_witnesses(self.witnesses, run_id, key)
        if witnesses.manifest_digest != digest.sha256(self.manifest.payload):
            raise VerificationError("the witnesses are those of another manifest")
        witness.check_quorum(witnesses, run_id, spec.checkpoints, checkpoint)
        return checkpoint

    def _publication_key(self, run_id: bytes, spec: RunSpec, known_roots: Sequence[bytes]) -> bytes:
        own = parse_roots(self.roots, run_id, spec)
        shared = min(len(own), len(known_roots))
        if list(own[:shared]) != list(known_roots[:shared]):
            raise VerificationError("the checkpoint's roots are not those that are trusted on this machine")
        return governance.publication_key(run_id, spec, max(own, known_roots, key=len))


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
