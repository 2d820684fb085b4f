"""Records of tests whose averages their reducers signed."""

from __future__ import annotations

from collections.abc import Sequence

from swarm import averages
from swarm.identity import Identity
from swarm.proto.round_pb2 import Record

REDUCER = Identity(b"reducer".ljust(32, b"."))


def sign_averages(record: Record, run_id: bytes, reducers: Sequence[Identity] = (REDUCER,)) -> Record:
    """``record``, each present part of which one of ``reducers``, in turn, averaged and signed; as the last change."""
    for index, part in enumerate(record.parts):
        if part.digest:
            reducer = reducers[index % len(reducers)]
            part.reducer = reducer.public_key
            signed = averages.payload(record, part)
            part.signature = reducer.sign(averages.AVERAGE_CONTEXT, run_id, signed).signature
    return record
