"""The directory accepts only signed, short-lived, small records of its run, and safe messages."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import msgpack
import pytest

from peer.p2p import directory
from peer.p2p.directory import Directory, Record
from swarm.errors import ProtocolError, SignatureError, VerificationError
from swarm.identity import Identity

NOW = 1_800_000_000.0
KEY = "status/0"
ME = Identity(b"m" * 32)
OTHER = Identity(b"o" * 32)
RULES = Directory(b"r" * 20, [KEY, "status/1"])


def record(
    *, rules: Directory = RULES, key: str = KEY, value: bytes = b"hello", lifetime_s: float = 60.0, by: Identity = ME
) -> Record:
    expires = NOW + lifetime_s
    return Record(
        key_hash=next(h for h, name in rules._key_of_hash.items() if name == key),
        subkey=msgpack.packb(by.public_key),
        value=msgpack.packb(rules.seal(by, key, value, expires)),
        expires_unix_s=expires,
    )


def test_an_honest_record_opens_to_its_signer_and_value() -> None:
    assert RULES.open(record(), NOW) == (ME.public_key, b"hello")


@pytest.mark.parametrize(
    ("case", "size", "lifetime_s"),
    [
        ("empty value", 0, 60.0),
        ("largest value", directory.MAX_VALUE_BYTES, 60.0),
        ("longest life", 10, 600.0),
        ("longest life by a clock 3 s ahead", 10, 603.0),
        ("expired while it travelled", 10, -5.0),
    ],
)
def test_a_record_at_the_edge_of_the_rules_is_accepted(case: str, size: int, lifetime_s: float) -> None:
    assert RULES.open(record(value=b"v" * size, lifetime_s=lifetime_s), NOW)[1] == b"v" * size


def _oversize() -> Record:
    honest = record()
    payload = struct.pack(">d", honest.expires_unix_s) + b"v" * (directory.MAX_VALUE_BYTES + 1)
    signed = ME.sign(f"dht:{KEY}", RULES.run_id, payload)
    return replace(honest, value=msgpack.packb(signed.SerializeToString()))


def _without_expiry() -> Record:
    signed = ME.sign(f"dht:{KEY}", RULES.run_id, b"short")
    return replace(record(), value=msgpack.packb(signed.SerializeToString()))


HOSTILE: list[tuple[str, Callable[[], Record]]] = [
    ("squatting with an expiry far away", lambda: record(lifetime_s=10 * 365 * 86400.0)),
    ("an expiry just beyond the rules", lambda: record(lifetime_s=604.0)),
    ("an expiry at infinity", lambda: replace(record(), expires_unix_s=float("inf"))),
    ("an expiry that is not a number", lambda: replace(record(), expires_unix_s=float("nan"))),
    ("an expiry of another type", lambda: replace(record(), expires_unix_s="soon")),  # type: ignore[arg-type]
    ("long expired", lambda: record(lifetime_s=-61.0)),
    ("somebody prolongs what another one signed", lambda: replace(record(), expires_unix_s=NOW + 61.0)),
    ("value beyond 16 KiB", _oversize),
    ("record of a mebibyte", lambda: replace(record(), value=b"\xc6\x00\x10\x00\x00" + bytes(1 << 20))),
    ("in the slot of another peer", lambda: replace(record(), subkey=msgpack.packb(OTHER.public_key))),
    ("slot that is no key", lambda: replace(record(), subkey=msgpack.packb(b"short"))),
    ("slot that is text", lambda: replace(record(), subkey=msgpack.packb("x" * 32))),
    ("no slot at all", lambda: replace(record(), subkey=msgpack.packb(None))),
    ("of another run", lambda: replace(record(), value=record(rules=Directory(b"x" * 20, [KEY])).value)),
    ("signed for another key", lambda: replace(record(), key_hash=record(key="status/1").key_hash)),
    ("under an unknown key", lambda: record(rules=Directory(b"r" * 20, ["elsewhere"]), key="elsewhere")),
    ("under a hash of a wrong length", lambda: replace(record(), key_hash=b"\x00" + record().key_hash)),
    ("value of another type", lambda: replace(record(), value=msgpack.packb(["list"]))),
    ("value that is no signature", lambda: replace(record(), value=msgpack.packb(b"\xff" * 100))),
    ("value without its expiry", _without_expiry),
    ("value cut short", lambda: replace(record(), value=record().value[:-1])),
]


@pytest.mark.parametrize("build", [build for _, build in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_a_hostile_record_is_refused(build: Callable[[], Record]) -> None:
    with pytest.raises(VerificationError):
        RULES.open(build(), NOW)


def test_a_flipped_bit_in_the_value_is_a_signature_error() -> None:
    honest = record()
    flipped = honest.value.replace(b"hello", b"hellp")
    with pytest.raises(SignatureError):
        RULES.open(replace(honest, value=flipped), NOW)


@pytest.mark.parametrize(("key", "size"), [("status/9", 1), (KEY, directory.MAX_VALUE_BYTES + 1)])
def test_sealing_refuses_an_unknown_key_or_a_large_value(key: str, size: int) -> None:
    with pytest.raises(ProtocolError):
        RULES.seal(ME, key, b"v" * size, NOW + 60)


@pytest.mark.parametrize(
    ("signers", "used_bytes", "record_bytes", "expected"),
    [
        (0, 0, directory.MAX_RECORD_BYTES, True),
        (directory.MAX_SIGNERS - 1, 0, 1, True),
        (directory.MAX_SIGNERS, 0, 1, False),
        (5, directory.MAX_KEY_BYTES, 1, False),
        (5, directory.MAX_KEY_BYTES - 1, 1, True),
    ],
)
def test_a_key_has_room_for_bounded_signers_and_bytes(
    signers: int, used_bytes: int, record_bytes: int, expected: bool
) -> None:
    assert directory.has_room(signers, used_bytes, record_bytes) is expected


def nested_arrays(depth: int) -> bytes:
    return b"\x91" * depth + b"\x01"


def nested_extensions(depth: int) -> bytes:
    raw = b"\x01"
    for _ in range(depth):
        raw = b"\xc9" + len(raw).to_bytes(4, "big") + b"\x40" + raw
    return raw


SAFE = [
    ("every type", [None, True, 1, -1, 200, -200, 70000, 2**40, -(2**40), 1.5, "x", "y" * 40, "z" * 300, b"b" * 70000]),
    ("maps and arrays", {"a": [1, {"b": [[], {}]}], "c": list(range(100)), "d": {str(i): i for i in range(50)}}),
    ("tuple", msgpack.ExtType(0x40, msgpack.packb([1, 2, msgpack.ExtType(0x40, msgpack.packb([3]))]))),
    ("dictionary of records", msgpack.ExtType(0x50, msgpack.packb([1, 2.0, [[b"k" * 32, b"v" * 99, 3.0]] * 1024]))),
]


@pytest.mark.parametrize("value", [value for _, value in SAFE], ids=[name for name, _ in SAFE])
def test_ordinary_messages_pass(value: object) -> None:
    directory.check_msgpack(msgpack.packb(value))


UNSAFE = [
    ("arrays 33 deep", nested_arrays(33)),
    ("arrays a million deep", nested_arrays(1_000_000)),
    ("extensions 33 deep", nested_extensions(33)),
    ("extensions 20,000 deep", nested_extensions(20_000)),
    ("arrays inside an extension", msgpack.packb(msgpack.ExtType(0x50, nested_arrays(40)))),
    ("a map of maps", b"\x81\x01" * 40 + b"\x01"),
    ("too many items", msgpack.packb(list(range(directory.MAX_ITEMS + 1)))),
    ("an array that promises four billion items", b"\xdd\xff\xff\xff\xff\x01"),
    ("bytes that promise four gigabytes", b"\xc6\xff\xff\xff\xff"),
    ("a length that is cut short", b"\xc6\xff"),
    ("an extension without a type", b"\xc7\x00"),
    ("a tensor description", msgpack.packb(msgpack.ExtType(0x51, b"\x80"))),
    ("a timestamp", b"\xd6\xff\0\0\0\0"),
    ("the byte that msgpack never uses", b"\xc1"),
]


@pytest.mark.parametrize("raw", [raw for _, raw in UNSAFE], ids=[name for name, _ in UNSAFE])
def test_dangerous_messages_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        directory.check_msgpack(raw)
