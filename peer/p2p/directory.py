"""Which records the directory (a DHT) accepts, and which of its messages are safe to decode.

Pure. A record lives under a key of this run, in the slot of the public key that signed it, for at most ten minutes,
in at most 16 KiB. The signature covers the moment of expiry too, so nobody can prolong what somebody else said.
Leaves storing and finding to `peer.p2p.network`, and the meaning of a value to whoever looks it up.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from swarm.errors import ProtocolError
from swarm.identity import PUBLIC_KEY_BYTES, Identity, verify
from swarm.proto.common_pb2 import Signed

MAX_LIFETIME_S = 600.0
MAX_VALUE_BYTES = 16 << 10
# A value with its expiry, signer, signature and framing.
MAX_RECORD_BYTES = MAX_VALUE_BYTES + 256
# All values under one key travel in one message of at most 4 MiB, and one more message may be merged into them.
MAX_KEY_BYTES = 3 << 19
MAX_SIGNERS = 1024
# Peers' clocks may differ by 3 s (hivemind refuses more); a holder may hand out what expired a moment ago.
MAX_SKEW_S = 3.0
_EXPIRED_GRACE_S = 60.0
_MAX_VERIFIED = 16 * MAX_SIGNERS
_EXPIRY = struct.Struct(">d")

MAX_DEPTH = 32
MAX_ITEMS = 8 * MAX_SIGNERS
# hivemind's extension types of the directory: a tuple, a dictionary of records.
_NESTED = (b"\x40", b"\x50")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as it travels: ``subkey`` and ``value`` are msgpack, the time is unix seconds."""

    key_hash: bytes
    subkey: bytes
    value: bytes
    expires_unix_s: float


class Directory:
    """The rules of one run: only these keys exist."""

    def __init__(self, run_id: bytes, keys: Iterable[str]) -> None:
        self.run_id = run_id
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._key_of_hash = {hashlib.sha1(self.full_key(key)).digest(): key for key in keys}

    def full_key(self, key: str) -> bytes:
        """What hivemind hashes (SHA-1, its choice: a place in the table, not a proof) to find the place of ``key``."""
        return f"{self.run_id.hex()}/{key}".encode()

    def knows(self, key: str) -> bool:
        return key in self._key_of_hash.values()

    def seal(self, identity: Identity, key: str, value: bytes, expires_unix_s: float) -> bytes:
        """``value`` with its expiry, signed. Raises `ProtocolError` where it is too large or the key is unknown."""
        if not self.knows(key):
            raise ProtocolError(f"{key!r} is not a key of this run's directory")
        if len(value) > MAX_VALUE_BYTES:
            raise ProtocolError(f"a directory value of {len(value)} bytes exceeds {MAX_VALUE_BYTES}")
        payload = _EXPIRY.pack(expires_unix_s) + value
        return identity.sign(f"dht:{key}", self.run_id, payload).SerializeToString()

    def open(self, record: Record, now_unix_s: float) -> tuple[bytes, bytes]:
        """(signer, value) of a record that keeps every rule. Raises `VerificationError`."""
        key = self._key_of_hash.get(record.key_hash)
        if key is None:
            raise ProtocolError("a record under a key that this run does not have")
        if len(record.value) > MAX_RECORD_BYTES:
            raise ProtocolError(f"a record of {len(record.value)} bytes exceeds {MAX_RECORD_BYTES}")
        if type(record.expires_unix_s) is not float:
            raise ProtocolError("a record whose expiry is no time")
        left_s = record.expires_unix_s - now_unix_s
        if not (math.isfinite(left_s) and -_EXPIRED_GRACE_S <= left_s <= MAX_LIFETIME_S + MAX_SKEW_S):
            raise ProtocolError(f"a record that would live for {left_s:.0f} s")
        signer = unpack_bin(record.subkey)
        if len(signer) != PUBLIC_KEY_BYTES:
            raise ProtocolError("a record whose slot is no public key")
        payload = self._payload(unpack_bin(record.value), key, signer)
        if payload[: _EXPIRY.size] != _EXPIRY.pack(record.expires_unix_s):
            raise ProtocolError("a record with another expiry than the signed one")
        return signer, payload[_EXPIRY.size :]

    def _payload(self, raw: bytes, key: str, signer: bytes) -> bytes:
        try:
            signed = Signed.FromString(raw)
        except DecodeError as error:
            raise ProtocolError("a record cannot be read") from error
        # The same records come from many nodes, again and again: a good signature is checked once.
        known = hashlib.sha256(key.encode() + b"\0" + signer + raw).digest()
        if known in self._verified:
            payload = signed.payload
        else:
            payload = verify(signed, f"dht:{key}", self.run_id, signer)
            self._verified[known] = None
            if len(self._verified) > _MAX_VERIFIED:
                self._verified.popitem(last=False)
        if not _EXPIRY.size <= len(payload) <= _EXPIRY.size + MAX_VALUE_BYTES:
            raise ProtocolError(f"a record with a payload of {len(payload)} bytes")
        return payload


def has_room(signers: int, used_bytes: int, record_bytes: int) -> bool:
    """Whether one more signer's record fits under a key that holds ``used_bytes`` by ``signers`` others."""
    return signers < MAX_SIGNERS and used_bytes + record_bytes <= MAX_KEY_BYTES


def unpack_bin(raw: bytes) -> bytes:
    """The bytes in a msgpack ``bin 8`` or ``bin 16`` that fills ``raw``. Raises `ProtocolError`."""
    if raw[:1] == b"\xc4" and len(raw) >= 2 and len(raw) == 2 + raw[1]:
        return raw[2:]
    if raw[:1] == b"\xc5" and len(raw) >= 3 and len(raw) == 3 + int.from_bytes(raw[1:3], "big"):
        return raw[3:]
    raise ProtocolError("a record field that is not a string of bytes")


def check_msgpack(raw: bytes) -> None:
    """Refuse a msgpack message that nests too deep, holds too many items or a foreign type. Raises `ProtocolError`.

    The decoder recurses on the machine's stack for every nested extension, so a short hostile message would end the
    process. This walk keeps its own stack, creates nothing and looks at every item once (msgpack specification).
    """
    # What is still to walk: (position, end, depth) of the message and of each extension that is decoded in turn.
    regions = [(0, len(raw), 0)]
    seen = 0
    while regions:
        position, end, depth = regions.pop()
        open_items: list[int] = []  # items left in each array or map that is open at this position
        while position < end:
            seen += 1
            level = depth + len(open_items)
            if seen > MAX_ITEMS or level > MAX_DEPTH:
                raise ProtocolError(f"a directory message of over {MAX_ITEMS} items or {MAX_DEPTH} levels")
            position, size, items, is_nested = _header(raw, position)
            if position + size > end:
                raise ProtocolError("a directory message that is cut short")
            if is_nested:
                regions.append((position, position + size, level + 1))
            position += size
            if open_items:
                open_items[-1] -= 1
            if items:
                open_items.append(items)
            while open_items and not open_items[-1]:
                open_items.pop()
        if open_items:
            raise ProtocolError("a directory message that is cut short")


# What the first byte says: how wide a length follows, or how large the body is (msgpack specification, formats).
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_PLAIN = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_PLAIN |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_SIZED_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _header(raw: bytes, position: int) -> tuple[int, int, int, bool]:
    """(where the body starts, its bytes, items that follow as elements, whether the body is msgpack again)."""
    kind = raw[position]
    start = position + 1
    if kind < 0x80 or kind >= 0xE0:
        return start, 0, 0, False
    if kind < 0xC0:
        low = kind & 0x0F
        return (start, 0, 2 * low, False) if kind < 0x90 else _fixed_array_or_string(kind, start)
    if kind in _PLAIN:
        return start, _PLAIN[kind], 0, False
    if kind in _SIZED:
        width = _SIZED[kind]
        return start + width, _number(raw, start, width), 0, False
    if kind in _CONTAINERS:
        width, each = _CONTAINERS[kind]
        return start + width, 0, each * _number(raw, start, width), False
    width = _SIZED_EXT.get(kind, 0)
    size = _number(raw, start, width) if width else _FIXED_EXT.get(kind, -1)
    if size < 0 or raw[start + width : start + width + 1] not in _NESTED:
        raise ProtocolError("a directory message with a value of a foreign type")
    return start + width + 1, size, 0, True


def _fixed_array_or_string(kind: int, start: int) -> tuple[int, int, int, bool]:
    return (start, 0, kind & 0x0F, False) if kind < 0xA0 else (start, kind & 0x1F, 0, False)


def _number(raw: bytes, start: int, width: int) -> int:
    if start + width > len(raw):
        raise ProtocolError("a directory message that is cut short")
    return int.from_bytes(raw[start : start + width], "big")
