"""A connection to the coordinator whose TLS key is the one that the invite pins.

Decides that nothing is sent before the pin was checked; leaves the calls to `peer.coordinator_client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from swarm import digest
from swarm.errors import PinError, SwarmError, Unreachable
from swarm.invite import Invite

CONNECT_TIMEOUT_S = 10.0
MAX_REPLY_BYTES = 144 << 20  # data manifest and tokenizer, 64 MiB each
MAX_REQUEST_BYTES = 16 << 20
ADVICE = "check your connection; ask the organizer whether the coordinator runs; training goes on without it"
_SERVER_NAME = "swarm-coordinator"
_OPTIONS = (
    ("grpc.ssl_target_name_override", _SERVER_NAME),
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    ("grpc.enable_http_proxy", 0),  # the pin was checked on a direct connection
    ("grpc.use_local_subchannel_pool", 1),  # a new connection does not wait for an old one's back-off
)


@dataclass(slots=True)
class Connection:
    """A channel, how many calls use it, and whether it is given up (closed after its last call)."""

    channel: Any
    calls: int = 0
    retired: bool = False


async def open_connection(invite: Invite) -> Connection:
    """A connection to the first address that works; else the gravest of what went wrong."""
    failures: list[SwarmError] = []
    for address in invite.addresses:
        try:
            return await _open_address(address, invite.tls_pin)
        except (Unreachable, PinError) as error:
            failures.append(error)
    for failure in failures:
        if isinstance(failure, PinError):
            raise failure
    raise Unreachable("no coordinator answers: " + "; ".join(str(failure) for failure in failures), ADVICE)


async def _open_address(address: str, tls_pin: bytes) -> Connection:
    certificate = await _fetch_certificate(address)
    _check_pin(certificate, tls_pin, address)
    credentials = grpc.ssl_channel_credentials(ssl.DER_cert_to_PEM_cert(certificate).encode())
    channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
    try:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_TIMEOUT_S)
    except BaseException as error:
        await channel.close()
        if isinstance(error, asyncio.TimeoutError):
            raise Unreachable(f"{address}: no secure connection within {CONNECT_TIMEOUT_S:.0f} s", ADVICE) from error
        raise
    return Connection(channel)


async def _fetch_certificate(address: str) -> bytes:
    """The DER certificate that ``address`` shows, not verified by anybody yet."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    opening = asyncio.open_connection(host.strip("[]"), int(port), ssl=context, server_hostname=_SERVER_NAME)
    try:
        _, writer = await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)
    except asyncio.TimeoutError as error:
        raise Unreachable(f"{address}: no answer within {CONNECT_TIMEOUT_S:.0f} s", ADVICE) from error
    except ssl.SSLError as error:
        raise Unreachable(f"{address}: does not speak TLS", ADVICE) from error
    except OSError as error:
        raise Unreachable(f"{address}: {error.strerror or error}", ADVICE) from error
    try:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return certificate or b""


def _check_pin(certificate: bytes, tls_pin: bytes, address: str) -> None:
    try:
        public_key = x509.load_der_x509_certificate(certificate).public_key()
        pin = digest.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PinError(f"{address}: shows no usable certificate") from error
    if pin != tls_pin:
        raise PinError(
            f"{address}: answers with another key than the invite's",
            "do not join; ask the organizer for a fresh invite over another channel",
        )
