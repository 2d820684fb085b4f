"""The coordinator's TLS key: a self-made certificate that the invite pins, so that no certificate authority is needed.

Decides the certificate's form and its pin; leaves serving to `coordinator.server`. Key and certificate are one file,
so that a crash can never leave one without the other. The certificate has no meaningful validity period: clients
trust the pinned key and nothing else, and volunteers' clocks may be wrong.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from swarm.digest import sha256
from swarm.errors import ConfigError

SUBJECT_NAME = "swarm-coordinator"
KEY_FILE = "tls.pem"
_NOT_BEFORE = datetime.datetime(2020, 1, 1)
_NOT_AFTER = datetime.datetime(9999, 12, 31)  # RFC 5280, 4.1.2.5: no well-defined expiration


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsKey:
    """``private_key_pem`` is secret. ``pin``: SHA-256 of the DER SubjectPublicKeyInfo, 32 bytes."""

    private_key_pem: bytes
    certificate_pem: bytes
    pin: bytes

    def __repr__(self) -> str:
        return f"TlsKey(pin={self.pin.hex()})"


def load_or_create(state_dir: Path) -> TlsKey:
    """The key in ``state_dir``; made on the first start, mode 0600. `ConfigError` where it cannot be used."""
    path = state_dir / KEY_FILE
    if not path.exists():
        _create(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others", f"run: chmod 600 {path}")
    return _parse(path)


def _parse(path: Path) -> TlsKey:
    raw = path.read_bytes()
    try:
        key = serialization.load_pem_private_key(raw, password=None)
        certificate = x509.load_pem_x509_certificate(raw)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged", "restore it from a backup; a new key needs new invites") from error
    public_key = _public_der(certificate.public_key())
    if _public_der(key.public_key()) != public_key:
        raise ConfigError(f"{path}: key and certificate do not belong together", "restore it from a backup")
    return TlsKey(
        private_key_pem=_private_pem(key),
        certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
        pin=sha256(public_key),
    )


def _create(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SUBJECT_NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SUBJECT_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_once(path, _private_pem(key) + certificate.public_bytes(serialization.Encoding.PEM))


def _write_once(path: Path, data: bytes) -> None:
    """Write ``data`` durably; where another process was first, its file stays."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        os.unlink(temporary)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _private_pem(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("the TLS key is not an ECDSA key", "restore it from a backup")
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_der(public_key: object) -> bytes:
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise ConfigError("the TLS key is not an ECDSA key", "restore it from a backup")
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
