"""Who takes part: admission, and what admitted peers report about themselves.

Decides who is admitted and which reported values are believable; leaves contributions, which nobody can report about
himself, to `coordinator.contributions`. The functions that take a `Store` write, so they run on the writer's thread.
"""

from __future__ import annotations

import hmac
import logging
import math
import re
from collections.abc import Collection, Sequence

from google.protobuf.message import DecodeError

from coordinator import incidents
from coordinator.published import Introduction
from coordinator.run import Run
from coordinator.store import ReportRow, Store
from swarm import run_spec
from swarm.digest import DIGEST_BYTES, sha256
from swarm.errors import NotAdmitted, ProtocolError
from swarm.identity import peer_id_of, verify
from swarm.proto.common_pb2 import Admission, Signed
from swarm.proto.coordinator_pb2 import AdmitPayload, ReportPayload
from swarm.run_record import NAME_PATTERN

ADMIT_CONTEXT = "admit"
REPORT_CONTEXT = "report"
ADMISSION_CONTEXT = "admission"
ADMISSION_LIFETIME_S = 7 * 24 * 3600
MAX_CLOCK_DIFFERENCE_S = 300
MAX_PEERS = 100_000
MAX_SEED_ADDRESSES = 16
MAX_TOLD_ADDRESSES = 1024
MAX_NAME_CHARACTERS = 64
MAX_INCIDENT_CHARACTERS = 512
MAX_ADDRESS_CHARACTERS = 256
MAX_LOSS = 1e6
MAX_COUNT = 2**53
_MAX_ADDRESSES_PER_PEER = 8
_logger = logging.getLogger(__name__)


def admit(run: Run, store: Store, request: Signed, now_unix_ms: int, seeds: Collection[bytes] = ()) -> Signed:
    """The signed `Admission` of whoever signed ``request``; ``seeds``: further seed peers by the organizer's list.

    Raises `SignatureError`, `ProtocolError`, and `NotAdmitted` for a peer that the run's rules keep out.
    """
    raw = verify(request, ADMIT_CONTEXT, run.run_id)
    try:
        payload = AdmitPayload.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("a request for admission cannot be read") from error
    check_fresh(payload.sent_unix_ms, now_unix_ms)
    check_name(payload.agent, "agent")
    check_display_name(payload.name)
    check_seed_addresses(payload.seed_addresses, request.signer, (*run.seed_peers, *seeds))
    reason = refusal(run.spec.admission, request.signer, payload.token, (*run.seed_peers, *seeds))
    if reason is not None:
        raise NotAdmitted(f"not admitted: {reason}", "ask the organizer of the run for an invite")
    expires_unix_s = now_unix_ms // 1000 + ADMISSION_LIFETIME_S
    store.admit(request.signer, expires_unix_s * 1000, now_unix_ms, MAX_PEERS)
    store.published.introduce(request.signer, Introduction(name=payload.name, agent=payload.agent))
    if payload.seed_addresses:
        store.set_seed_addresses(request.signer, payload.seed_addresses, now_unix_ms)
    admission = Admission(peer_key=request.signer, expires_unix_s=expires_unix_s)
    return run.sign(ADMISSION_CONTEXT, admission.SerializeToString(deterministic=True))


def report(run: Run, store: Store, request: Signed, now_unix_ms: int, seeds: Collection[bytes] = ()) -> None:
    """Write down what an admitted peer reports; one that arrives twice or late changes nothing.

    Raises `SignatureError`, `ProtocolError`, and `NotAdmitted` for a peer that is not (or no longer) admitted.
    """
    raw = verify(request, REPORT_CONTEXT, run.run_id)
    try:
        payload = ReportPayload.FromString(raw)
    except DecodeError as error:
        raise ProtocolError("a report cannot be read") from error
    peer = store.peer(request.signer)
    if peer is None or peer.admitted_until_unix_ms <= now_unix_ms:
        raise NotAdmitted("only admitted peers report", "ask for admission first, or again")
    check_fresh(payload.sent_unix_ms, now_unix_ms)
    check_seed_addresses(payload.seed_addresses, request.signer, (*run.seed_peers, *seeds))
    row = checked_report(payload, run.spec.num_shards)
    if payload.incident:
        check_name(payload.incident, "report: incident", MAX_INCIDENT_CHARACTERS)
        _logger.error("incident told by %s: %s", peer_id_of(request.signer), payload.incident)
        name = f"told by {peer_id_of(request.signer)}"[:MAX_NAME_CHARACTERS]
        incidents.tell(store, name, f"{name}: {payload.incident}", now_unix_ms)
    if row.reported_unix_ms <= peer.reported_unix_ms:
        return
    store.report(request.signer, row, now_unix_ms)
    if payload.seed_addresses:
        store.set_seed_addresses(request.signer, payload.seed_addresses, now_unix_ms)


def refusal(rule: run_spec.Admission, peer_key: bytes, token: str, seed_peers: Collection[bytes]) -> str | None:
    """Why the run's rule keeps this peer out; None where it is admitted."""
    if peer_key in seed_peers or rule.mode == "open":
        return None
    if rule.mode == "allow":
        return None if peer_id_of(peer_key) in rule.allow else "this peer is not on the organizer's list"
    right = hmac.compare_digest(sha256(token.encode()).hex(), rule.token_sha256 or "")
    return None if right else "the token is missing or wrong"


def check_fresh(sent_unix_ms: int, now_unix_ms: int) -> None:
    """Refuse what was signed long ago, or in the future."""
    difference_s = (sent_unix_ms - now_unix_ms) / 1000
    if abs(difference_s) > MAX_CLOCK_DIFFERENCE_S:
        raise ProtocolError(
            f"the request's time is {difference_s:.0f} s away from the coordinator's", "set this machine's clock"
        )


def check_name(text: str, what: str, most: int = MAX_NAME_CHARACTERS) -> None:
    """Refuse text that is too long or that would move a terminal's cursor."""
    if len(text) > most or not text.isprintable():
        raise ProtocolError(f"{what}: not printable text of at most {most} characters")


def check_display_name(name: str) -> None:
    """Refuse a name that would not fit on a card; none is fine."""
    if name and (len(name) > 64 or re.fullmatch(NAME_PATTERN, name) is None or not name.isprintable()):
        raise ProtocolError("a name is printable text of at most 64 characters without markup")


def check_seed_addresses(addresses: Sequence[str], peer_key: bytes, seed_peers: Collection[bytes]) -> None:
    """Refuse addresses from anybody but a seed peer, and what is no multiaddr of that very peer."""
    if not addresses:
        return
    if peer_key not in seed_peers:
        who = peer_id_of(peer_key)
        raise NotAdmitted(
            f"{who} is not on the list of seed peers", f"the organizer adds it: swarm seeds RUN.toml --add {who}"
        )
    if len(addresses) > _MAX_ADDRESSES_PER_PEER:
        raise ProtocolError(f"{len(addresses)} seed addresses; at most {_MAX_ADDRESSES_PER_PEER}")
    ending = f"/p2p/{peer_id_of(peer_key)}"
    for address in addresses:
        plain = address.isascii() and address.isprintable() and " " not in address
        if not (plain and address.startswith("/") and address.endswith(ending)):
            raise ProtocolError("a seed address is not a multiaddr that ends with its peer's id")
        if len(address) > MAX_ADDRESS_CHARACTERS:
            raise ProtocolError(f"a seed address has more than {MAX_ADDRESS_CHARACTERS} characters")


def checked_report(payload: ReportPayload, num_shards: int) -> ReportRow:
    """``payload`` as a row, once every value is within its bounds; ``num_shards``: of the run."""
    for name in ("round", "bytes_sent", "bytes_received"):
        if getattr(payload, name) > MAX_COUNT:
            raise ProtocolError(f"report: {name} is larger than 2^53")
    for name in ("state_digest", "log_digest"):
        if len(getattr(payload, name)) not in (0, DIGEST_BYTES):
            raise ProtocolError(f"report: {name} has a wrong length")
    speeds = payload.shard_tokens_per_s
    if payload.first_shard + max(1, payload.num_shards) > num_shards or len(speeds) not in (0, payload.num_shards):
        raise ProtocolError("report: its span is not one of the run, or has other speeds than shards")
    for speed in (payload.tokens_per_s, payload.service_tokens_per_s, *speeds):
        if not 0 <= speed <= MAX_COUNT:  # also false for NaN
            raise ProtocolError("report: a speed is not a believable number")
    check_name(payload.device, "report: device")
    return ReportRow(
        reported_unix_ms=payload.sent_unix_ms,
        round=payload.round,
        state_digest=payload.state_digest,
        log_digest=payload.log_digest,
        tokens_per_s=payload.tokens_per_s,
        bytes_sent=payload.bytes_sent,
        bytes_received=payload.bytes_received,
        device=payload.device,
        leaving=payload.leaving,
        train_loss=_loss(payload.train_loss, "train_loss"),
        validation_loss=_loss(payload.validation_loss, "validation_loss"),
        first_shard=payload.first_shard,
        num_shards=payload.num_shards,
        service_tokens_per_s=payload.service_tokens_per_s,
        shard_tokens_per_s=tuple(speeds),
    )


def _loss(value: float, name: str) -> float | None:
    if math.isnan(value):
        return None
    if not 0 <= value <= MAX_LOSS:
        raise ProtocolError(f"report: {name} is neither NaN nor a believable loss")
    return value
