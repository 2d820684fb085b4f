"""Ed25519 identities: one key signs what a person or peer says, and its libp2p form is the peer id.

Decides how keys are written down and what exactly is signed; leaves files to `swarm.keyfiles` and trust to the callers.

A libp2p Ed25519 peer id is base58 of the identity multihash of the protobuf-encoded public key
(libp2p specification, peer-ids): ``00 24 | 08 01 12 20 | 32 bytes``. So the peer id alone verifies a signature.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from swarm.errors import DataError, ProtocolError, SignatureError
from swarm.proto.common_pb2 import Signed

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_PEER_ID_CHARACTERS = 64
_PEER_ID_PREFIX = bytes.fromhex("0024" + "08011220")
_LIBP2P_PRIVATE_PREFIX = bytes.fromhex("08011240")


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key. ``seed`` is its 32 secret bytes; it never appears in logs or in ``repr``."""

    seed: bytes
    public_key: bytes = field(init=False, compare=False)
    _key: Ed25519PrivateKey = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.seed) != 32:
            raise DataError(f"an Ed25519 seed has 32 bytes, not {len(self.seed)}")
        # Once: who asks for a public key asks again and again, and each derivation takes 25 us.
        key = Ed25519PrivateKey.from_private_bytes(self.seed)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "public_key", key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def peer_id(self) -> str:
        return peer_id_of(self.public_key)

    def libp2p_key(self) -> bytes:
        """The key in the form of libp2p's crypto.pb.PrivateKey (Ed25519: seed followed by public key)."""
        return _LIBP2P_PRIVATE_PREFIX + self.seed + self.public_key

    def sign(self, context: str, run_id: bytes, payload: bytes) -> Signed:
        return Signed(
            signer=self.public_key,
            payload=payload,
            signature=self._key.sign(_signed_bytes(context, run_id, payload)),
        )

    def sign_metadata(self, canonical: bytes) -> bytes:
        """The bare signature that TUF's metadata carries; its bytes begin with a brace, so they are nothing of ours."""
        if not canonical.startswith(b"{"):
            raise DataError("metadata is signed as canonical JSON")
        return self._key.sign(canonical)


def peer_id_of(public_key: bytes) -> str:
    return str(base58.b58encode(peer_id_bytes(public_key)).decode())


def peer_id_bytes(public_key: bytes) -> bytes:
    """A peer id as libp2p's own messages carry it."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise DataError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return _PEER_ID_PREFIX + public_key


def public_key_of(peer_id: str) -> bytes:
    if len(peer_id) > MAX_PEER_ID_CHARACTERS:
        raise DataError("not a peer id: it is too long")
    try:
        raw = bytes(base58.b58decode(peer_id))
    except ValueError as error:
        raise DataError(f"not a peer id: {peer_id[:80]!r}") from error
    return public_key_of_bytes(raw)


def public_key_of_bytes(raw: bytes) -> bytes:
    if len(raw) != len(_PEER_ID_PREFIX) + PUBLIC_KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise DataError(f"not the peer id of an Ed25519 key: {raw[:40].hex()}")
    return raw[len(_PEER_ID_PREFIX) :]


def read_signed(raw: bytes) -> Signed:
    """What somebody sent as signed. Raises `ProtocolError` where it cannot be read."""
    try:
        return Signed.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("something signed cannot be read") from error


def verify(signed: Signed, context: str, run_id: bytes, signer: bytes | None = None) -> bytes:
    """The payload of ``signed``, once the signature (and the signer, where one is named) is right."""
    if signer is not None and signed.signer != signer:
        raise SignatureError(f"{context}: signed by another key than the expected one")
    if len(signed.signer) != PUBLIC_KEY_BYTES or len(signed.signature) != SIGNATURE_BYTES:
        raise SignatureError(f"{context}: key or signature of a wrong length")
    try:
        key = Ed25519PublicKey.from_public_bytes(signed.signer)
        key.verify(signed.signature, _signed_bytes(context, run_id, signed.payload))
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(f"{context}: the signature does not verify") from error
    return signed.payload


def _signed_bytes(context: str, run_id: bytes, payload: bytes) -> bytes:
    return b"swarm.v1\0" + context.encode() + b"\0" + run_id + b"\0" + payload
