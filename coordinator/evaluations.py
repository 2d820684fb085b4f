"""Evaluations that people tell: kept beside the checkpoint that they are of, and carried by the next record.

Decides who may tell (whoever the run's rule admits, and organizers), how much is kept (a few of each person, and only
so many of people whom the log does not credit: invented keys crowd nobody out), and which go onto the next card: whole
ones by organizers, seed peers and contributors, of none so many that others find no room. Whether one is true nobody
decides: it is its signer's word. What writes runs on the writer's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from coordinator import membership
from coordinator.published import EvaluationRow, Room, Rooms
from coordinator.run import Run
from coordinator.store import Store
from swarm import evaluation
from swarm.digest import sha256
from swarm.errors import NotAdmitted, NotFound, ProtocolError, VerificationError
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.common_pb2 import Signed

ROOMS = Rooms(total=Room(256, 4 << 20), of_strangers=Room(64, 1 << 20), of_signer=Room(16, 512 << 10))
MAX_TOKEN_CHARACTERS = 128
MAX_IN_RECORD = 32
MAX_OF_SIGNER = 8  # of these
MAX_RECORD_BYTES = 512 << 10
MAX_ROUNDS_READ = 64  # for it
_MAX_ROUND = 2**63 - 1


def tell(run: Run, store: Store, request: pb.TellEvaluationRequest, now_unix_ms: int) -> None:
    """Keep what was measured on a published checkpoint; told again, nothing changes.

    Raises `SignatureError`, `ProtocolError`, `NotAdmitted`, `NotFound` for a round without a checkpoint,
    `VerificationError` for an evaluation of another one, `ResourceError` where enough are kept.
    """
    signed = request.evaluation
    if len(signed.payload) > evaluation.MAX_TOLD_BYTES or len(request.token) > MAX_TOKEN_CHARACTERS:
        raise ProtocolError(f"an evaluation that is told has at most {evaluation.MAX_TOLD_BYTES} bytes")
    found = evaluation.parse_signed(signed, run.run_id)
    is_organizer = signed.signer.hex() in (run.spec.organizer_key, *run.spec.governance.organizers)
    if not is_organizer:
        reason = membership.refusal(run.spec.admission, signed.signer, request.token, run.seed_peers)
        if reason is not None:
            raise NotAdmitted(f"evaluations come from whom the run admits: {reason}", "ask the organizer for an invite")
    published = store.published.checkpoint(found.round) if found.round <= _MAX_ROUND else None
    if published is None:
        raise NotFound(f"no checkpoint of round {found.round} is published", "measure one that is")
    if published.manifest_digest.hex() != found.manifest_digest:
        raise VerificationError(f"round {found.round}: the evaluation is not of the published checkpoint")
    row = EvaluationRow(
        round=found.round,
        signer=signed.signer,
        digest=sha256(signed.payload),
        credited=is_organizer or _is_credited(run, store, signed.signer),
        told_unix_ms=now_unix_ms,
        signed=signed.SerializeToString(deterministic=True),
    )
    store.published.add_evaluation(row, ROOMS)


def of_round(store: Store, round_number: int) -> pb.ListEvaluationsReply:
    """What was told of a checkpoint; nothing of a round that has none."""
    rows = store.published.evaluations(round_number, ROOMS.total) if round_number <= _MAX_ROUND else []
    return pb.ListEvaluationsReply(evaluations=[Signed.FromString(row.signed) for row in rows])


def for_record(run: Run, store: Store, round_number: int) -> tuple[str, ...]:
    """What the record of a round carries of earlier checkpoints' evaluations, newest checkpoints first.

    Of each checkpoint everybody's first, then everybody's second; what does not fit is left out, and the rest is not.
    """
    chosen: list[str] = []
    size_bytes = 0
    used: dict[bytes, tuple[int, int]] = {}
    for earlier in store.published.evaluated_rounds(MAX_ROUNDS_READ):
        rows = store.published.evaluations(earlier, ROOMS.total) if earlier < round_number else []
        for row in _in_turns(rows):
            signed = Signed.FromString(row.signed)
            is_whole = evaluation.parse(signed.payload).limit is None
            if not is_whole or not (row.credited or _is_credited(run, store, row.signer)):
                continue
            text = evaluation.encode(signed)
            number, their_bytes = used.get(row.signer, (0, 0))
            if number >= MAX_OF_SIGNER or their_bytes + len(text) > MAX_RECORD_BYTES // 2:
                continue
            if size_bytes + len(text) > MAX_RECORD_BYTES:
                continue
            used[row.signer] = number + 1, their_bytes + len(text)
            chosen.append(text)
            size_bytes += len(text)
            if len(chosen) == MAX_IN_RECORD:
                return tuple(chosen)
    return tuple(chosen)


def _in_turns(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """In the order of telling, but nobody's second before everybody's first."""
    turns: Counter[bytes] = Counter()
    placed = []
    for row in rows:
        placed.append((turns[row.signer], row))
        turns[row.signer] += 1
    return [row for _, row in sorted(placed, key=lambda item: item[0])]


def _is_credited(run: Run, store: Store, key: bytes) -> bool:
    peer = store.peer(key)
    return key in run.seed_peers or (peer is not None and peer.tokens > 0)
