"""A signature over a model folder in the format of OpenSSF model signing, for who verifies with that and not with us.

Decides what is signed: every file of the folder but evaluations, which come later, and the signature itself. The format
(an in-toto statement in a DSSE envelope in a sigstore bundle) wants a key on a NIST curve, so this key is another than
the peer's Ed25519 key; a door to ``cryptography``. Verifying is the foreign tool's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swarm.errors import ConfigError, DataError
from swarm.evaluation import FOLDER as EVALUATIONS
from swarm.files import disk_errors, file_sha256, write_durably

SIGNATURE_NAME = "model.sig"
MAX_FILES = 10_000
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_PAYLOAD = "application/vnd.in-toto+json"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_IGNORED = (EVALUATIONS, SIGNATURE_NAME)


def load_or_create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in the PEM file ``path``, made with mode 0600 where there is none. Raises `ConfigError`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = ec.generate_private_key(ec.SECP256R1())
        text = made.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others", f"run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no key that can be used", "move it away; a new key is made") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path} holds no P-256 key", "move it away; a new key is made")
    return key


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """What verifies, in PEM."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(folder: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    """Write ``model.sig`` into ``folder``. Raises `DataError` for links and what is no file, `DiskFull`."""
    payload = json.dumps(statement(folder), sort_keys=True).encode()
    signature = key.sign(_encoded(payload), ec.ECDSA(hashes.SHA256()))
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(public_pem(key)).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    with disk_errors(folder):
        write_durably(folder / SIGNATURE_NAME, json.dumps(bundle).encode())
    return folder / SIGNATURE_NAME


def statement(folder: Path) -> dict[str, Any]:
    """What is signed: the folder's name, and the SHA-256 of every file in it, in the order of their names."""
    paths = sorted(path for path in folder.iterdir() if path.name not in _IGNORED)
    wrong = [path.name for path in paths if path.is_symlink() or not path.is_file()]
    if wrong or not paths or len(paths) > MAX_FILES:
        raise DataError(f"{folder} cannot be signed: {wrong[:3] or len(paths)}", "move what is no plain file away")
    digests = [(path.name, file_sha256(path)) for path in paths]
    whole = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in digests))
    return {
        "_type": _STATEMENT,
        "subject": [{"name": folder.resolve().name, "digest": {"sha256": whole.hexdigest()}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(_IGNORED),
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in digests],
        },
    }


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)
