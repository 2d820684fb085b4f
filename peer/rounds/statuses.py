"""Statuses: what replicas say of themselves in the directory, and what a round may conclude from it.

Decides which statuses count (signed, admitted, fresh, well formed) and turns them into the round machine's view. Pure:
bytes and the time in, verified words out. They are hints: the worst that a false one does is to waste time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from peer.p2p.reachability import is_relayed
from peer.rounds.planning import Candidate
from peer.rounds.round_actions import View
from swarm.errors import ProtocolError, SignatureError, SwarmError
from swarm.identity import Identity, verify
from swarm.proto.common_pb2 import Admission, Signed
from swarm.proto.round_pb2 import Status

STATUS_CONTEXT = "status"
ADMISSION_CONTEXT = "admission"
MAX_STATUSES = 4096
MAX_ADDRESSES = 8
MAX_ADDRESS_CHARACTERS = 256
MAX_TOKENS_PER_S = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRules:
    """``lifetime_s``: how old a status may be; ``founders`` (genesis voters) need no admission."""

    run_id: bytes
    publication_key: bytes
    founders: tuple[bytes, ...]
    lifetime_s: float


def status_key(shard: int) -> str:
    return f"status-{shard}"


def sign_status(identity: Identity, run_id: bytes, status: Status) -> bytes:
    return identity.sign(STATUS_CONTEXT, run_id, status.SerializeToString()).SerializeToString()


def read_status(raw: bytes, peer: bytes, rules: StatusRules, now_unix_s: float) -> Status:
    """The status that ``peer`` signed; an error says why it does not count."""
    try:
        status = Status.FromString(verify(Signed.FromString(raw), STATUS_CONTEXT, rules.run_id, peer))
    except DecodeError as error:
        raise ProtocolError("a status cannot be read") from error
    age_s = now_unix_s - status.sent_unix_ms / 1000
    if not -rules.lifetime_s <= age_s <= rules.lifetime_s:
        raise ProtocolError(f"a status that is {age_s:.0f} s old")
    if len(status.log_digest) != 32 or len(status.state_digest) != 32 or status.round < 1:
        raise ProtocolError("a status without a round or a state")
    if len(status.addresses) > MAX_ADDRESSES or any(len(a) > MAX_ADDRESS_CHARACTERS for a in status.addresses):
        raise ProtocolError("a status with too many or too long addresses")
    if not all(0 <= rate <= MAX_TOKENS_PER_S for rate in (status.tokens_per_s, status.service_tokens_per_s)):
        raise ProtocolError("a status with a speed that no peer has")  # no comparison holds for NaN
    if peer not in rules.founders:
        check_admission(status.admission, peer, rules, now_unix_s)
    return status


def check_admission(signed: Signed, peer: bytes, rules: StatusRules, now_unix_s: float) -> None:
    """Raise unless the coordinator admitted ``peer`` and the admission is still good."""
    try:
        admission = Admission.FromString(verify(signed, ADMISSION_CONTEXT, rules.run_id, rules.publication_key))
    except DecodeError as error:
        raise ProtocolError("an admission cannot be read") from error
    if admission.peer_key != peer:
        raise SignatureError("the admission is somebody else's")
    if now_unix_s > admission.expires_unix_s:
        raise SignatureError("the admission has expired")


def read_statuses(values: Mapping[bytes, bytes], rules: StatusRules, now_unix_s: float) -> dict[bytes, Status]:
    """Every status that counts, by peer; the others are left out."""
    statuses = {}
    for peer, raw in list(values.items())[:MAX_STATUSES]:
        try:
            statuses[peer] = read_status(raw, peer, rules, now_unix_s)
        except SwarmError:
            continue
    return statuses


def make_view(statuses: Mapping[bytes, Status], mine: Status, me: bytes) -> View:
    """Who stands where we stand; whether their round may open is `peer.rounds.pace`'s."""
    peers = [(key, status) for key, status in statuses.items() if key != me]
    alike = [
        (key, status)
        for key, status in [*peers, (me, mine)]
        if not status.leaving
        and (status.round, status.log_digest, status.state_digest) == (mine.round, mine.log_digest, mine.state_digest)
    ]
    candidates = tuple(
        Candidate(
            key=key,
            trains=status.trains,
            upload_bps=status.upload_bps,
            tokens=status.tokens,
            relayed=is_relayed(status.addresses),
        )
        for key, status in sorted(alike, key=_key)
    )
    return View(candidates=candidates)


def further_on(statuses: Mapping[bytes, Status], round_number: int) -> list[bytes]:
    """Peers that work towards a later round than ``round_number``, furthest first."""
    ahead: Sequence[tuple[bytes, Status]] = [(k, s) for k, s in statuses.items() if s.round > round_number]
    return [key for key, _ in sorted(ahead, key=lambda item: (-item[1].round, item[0]))]


def _key(item: tuple[bytes, Status]) -> bytes:
    return item[0]
