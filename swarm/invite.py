"""The invite: one string that names a coordinator, its pinned key and the run.

``swarm1`` + base58(protobuf `Invite` + first 4 bytes of its SHA-256). It holds no secret except an admission token,
where the run asks for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import base58
from google.protobuf.message import DecodeError

from swarm.digest import sha256
from swarm.errors import InviteError
from swarm.proto import common_pb2

PREFIX = "swarm1"
MAX_CHARACTERS = 2048
MAX_TOKEN_CHARACTERS = 128
RUN_ID_BYTES = 20
_ADVICE = "copy the whole invite again from where the organizer shared it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    run_id: bytes
    tls_pin: bytes
    addresses: tuple[str, ...]
    token: str = ""

    def encode(self) -> str:
        message = common_pb2.Invite(
            run_id=self.run_id, tls_pin=self.tls_pin, addresses=self.addresses, token=self.token
        )
        raw = message.SerializeToString(deterministic=True)
        return PREFIX + str(base58.b58encode(raw + sha256(raw)[:4]).decode())


def parse(text: str) -> Invite:
    """Read an invite; `InviteError` says what is wrong with it."""
    # Twice the limit leaves room for the line breaks that mail and chat programs add.
    if len(text) > 2 * MAX_CHARACTERS or len(text := "".join(text.split())) > MAX_CHARACTERS:
        raise InviteError("the invite is too long", _ADVICE)
    if not text.startswith(PREFIX):
        raise InviteError(f"an invite starts with {PREFIX!r}", _ADVICE)
    try:
        raw = bytes(base58.b58decode(text[len(PREFIX) :]))
    except ValueError as error:
        raise InviteError("the invite holds characters that no invite has", _ADVICE) from error
    if len(raw) < 5 or sha256(raw[:-4])[:4] != raw[-4:]:
        raise InviteError("the invite is cut short or mistyped (its checksum does not match)", _ADVICE)
    try:
        message = common_pb2.Invite.FromString(raw[:-4])
    except DecodeError as error:
        raise InviteError("the invite cannot be read", _ADVICE) from error
    return _validated(message)


def _validated(message: common_pb2.Invite) -> Invite:
    if len(message.run_id) != RUN_ID_BYTES or len(message.tls_pin) != 32:
        raise InviteError("the invite names no run or no key", _ADVICE)
    addresses = tuple(message.addresses)
    if not 1 <= len(addresses) <= 4:
        raise InviteError("the invite names no coordinator", _ADVICE)
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or len(address) > 255 or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
            raise InviteError(f"not an address: {address[:80]!r}", _ADVICE)
    if len(message.token) > MAX_TOKEN_CHARACTERS:
        raise InviteError("the invite's token is too long", _ADVICE)
    return Invite(run_id=message.run_id, tls_pin=message.tls_pin, addresses=addresses, token=message.token)
