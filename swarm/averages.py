"""What a reducer signs: which average it made of a part, out of whose contributions, with which weights and norms.

Decides the bytes under the signature, and checks it. Leaves to `peer.rounds.robust` what an average may be like, and to
`swarm.log` that a record without these signatures is none. Pure.
"""

from __future__ import annotations

import functools
import struct

from swarm.identity import verify
from swarm.proto.common_pb2 import Signed
from swarm.proto.round_pb2 import PartResult, Record

AVERAGE_CONTEXT = "average"


def payload(round_of: Record, part: PartResult) -> bytes:
    """The bytes that the reducer of ``part`` signs (docs/protocol.md), big endian.

    Of ``round_of`` only what an opened round has as well: shard, round, log and state digest, codec, and the attempt.
    """
    ballot, codec = round_of.opened_by, round_of.codec.encode()
    pieces = [
        struct.pack(">IQ", round_of.shard, round_of.round),
        *map(_sized, (round_of.log_digest, round_of.state_digest, codec, ballot.leader)),
        struct.pack(">IIII", ballot.number, part.first_slice, part.num_slices, part.size_bytes),
        _sized(part.digest),
        struct.pack(">HHH", len(part.shares), len(part.rejections), len(part.handed_over_by)),
    ]
    for share in part.shares:
        pieces += _sized(share.peer_key), struct.pack(">Qfd", share.weight_tokens, share.clipped_to, share.norm)
    for rejection in part.rejections:
        figures = rejection.weight_tokens, rejection.cosine, rejection.min_cosine, rejection.norm
        pieces += _sized(rejection.peer_key), struct.pack(">Qffd", *figures)
    return b"".join([*pieces, *map(_sized, part.handed_over_by)])


def check_signature(run_id: bytes, round_of: Record, part: PartResult) -> None:
    """Raise `SignatureError` unless the reducer that ``part`` names signed it."""
    _check(run_id, part.reducer, payload(round_of, part), part.signature)


# A voter checks a record when it accepts it, when it is committed, and when it goes into the log.
@functools.lru_cache(maxsize=256)
def _check(run_id: bytes, signer: bytes, signed: bytes, signature: bytes) -> None:
    verify(Signed(signer=signer, payload=signed, signature=signature), AVERAGE_CONTEXT, run_id)


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
