"""Identities: the peer id is the key, and a signature holds for one context, run and payload."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarm.errors import DataError, SignatureError
from swarm.identity import Identity, peer_id_of, public_key_of, verify
from swarm.proto.common_pb2 import Signed

IDENTITY = Identity(bytes(range(32)))
OTHER = Identity(b"\x01" * 32)
RUN_ID = b"r" * 20


def test_the_public_key_is_rfc_8032s() -> None:
    """RFC 8032, section 7.1, test 1: this secret key has this public key."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    expected = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert Identity(seed).public_key.hex() == expected


def test_a_peer_id_and_its_key_are_the_same_thing() -> None:
    """A peer id reads back to the public key, and looks as libp2p's Ed25519 ids do."""
    assert IDENTITY.peer_id.startswith("12D3KooW")
    assert public_key_of(IDENTITY.peer_id) == IDENTITY.public_key


def test_the_libp2p_form_holds_seed_and_public_key() -> None:
    """crypto.pb.PrivateKey: key_type Ed25519 (field 1), data of 64 bytes (field 2)."""
    assert IDENTITY.libp2p_key() == bytes.fromhex("0801" + "1240") + IDENTITY.seed + IDENTITY.public_key


def test_two_new_identities_differ() -> None:
    """A generated key is nobody else's."""
    assert Identity.generate() != Identity.generate()


def test_the_secret_does_not_appear_in_repr() -> None:
    """What is logged by accident names the peer, not its secret."""
    assert repr(IDENTITY) == f"Identity({IDENTITY.peer_id})"


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_seed_of_a_wrong_length_is_refused(length: int) -> None:
    """Only 32 bytes are an Ed25519 seed."""
    with pytest.raises(DataError, match="32 bytes"):
        Identity(bytes(length))


@pytest.mark.parametrize(
    ("name", "peer_id"),
    [
        ("empty", ""),
        ("not base58", "0OIl"),
        ("not ascii", "12D3KooWé"),
        ("cut short", IDENTITY.peer_id[:-1]),
        ("of an RSA key", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"),
        ("huge", "1" * 1_000_000),
    ],
)
def test_a_bad_peer_id_is_refused(name: str, peer_id: str) -> None:
    """What is not the id of an Ed25519 key is a data error."""
    with pytest.raises(DataError):
        public_key_of(peer_id)


def test_a_public_key_of_a_wrong_length_has_no_peer_id() -> None:
    """A key cut short does not become somebody's id."""
    with pytest.raises(DataError, match="31"):
        peer_id_of(bytes(31))


def test_an_honest_signature_gives_the_payload() -> None:
    """Verifying returns the bytes that were signed."""
    signed = IDENTITY.sign("status", RUN_ID, b"payload")
    assert verify(signed, "status", RUN_ID) == b"payload"
    assert verify(signed, "status", RUN_ID, IDENTITY.public_key) == b"payload"


def _flipped(field: str) -> Callable[[Signed], None]:
    def change(signed: Signed) -> None:
        value = bytearray(getattr(signed, field))
        value[0] ^= 1
        setattr(signed, field, bytes(value))

    return change


def _set(field: str, value: bytes) -> Callable[[Signed], None]:
    return lambda signed: setattr(signed, field, value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("payload flipped", _flipped("payload")),
        ("signature flipped", _flipped("signature")),
        ("signer flipped", _flipped("signer")),
        ("signer is somebody else", _set("signer", OTHER.public_key)),
        ("signature empty", _set("signature", b"")),
        ("signature too long", _set("signature", bytes(65))),
        ("signer empty", _set("signer", b"")),
        ("signer of small order", _set("signer", bytes(32))),
    ],
)
def test_a_changed_message_is_refused(name: str, change: Callable[[Signed], None]) -> None:
    """One flipped byte anywhere, and nothing of the message is used."""
    signed = IDENTITY.sign("status", RUN_ID, b"payload")
    change(signed)
    with pytest.raises(SignatureError):
        verify(signed, "status", RUN_ID)


@pytest.mark.parametrize(
    ("name", "context", "run_id"), [("context", "vote", RUN_ID), ("run", "status", b"s" * 20), ("both", "", b"")]
)
def test_a_signature_holds_for_its_context_and_run_alone(name: str, context: str, run_id: bytes) -> None:
    """A status cannot be replayed as a vote, nor in another run."""
    signed = IDENTITY.sign("status", RUN_ID, b"payload")
    with pytest.raises(SignatureError):
        verify(signed, context, run_id)


def test_a_valid_signature_of_another_key_is_refused() -> None:
    """Where the signer is known, nobody else's signature will do."""
    with pytest.raises(SignatureError, match="another key"):
        verify(OTHER.sign("status", RUN_ID, b"payload"), "status", RUN_ID, IDENTITY.public_key)
