"""A run's past on disk, made without living it: a log with votes, its averages, and the states along the way.

Every commit is one that a majority of the voters signed, so a newcomer proves it as it would any; only the averages are
noise. One donor's folder is written, and copies of it as it was some rounds ago are those of peers that slept.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import numpy as np
from averaging_ours import DISK_BYTES, ROUND_TOKENS, genesis_of, identity_of, spec_of
from averaging_place import Place

from peer.p2p.chunk_store import ChunkStore
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.paxos import to_message
from peer.rounds.planning import part_values, split_parts
from peer.rounds.shard import Shard
from swarm import averages
from swarm.digest import sha256
from swarm.identity import Identity
from swarm.log import VOTE_CONTEXT, LogHead, genesis_head, next_head
from swarm.proto.common_pb2 import Genesis
from swarm.proto.round_pb2 import Commit, Member, PartResult, Record, Share, Vote
from swarm.run_spec import RunSpec

WIRE_CODEC = "int4"
DONORS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    spec: RunSpec
    genesis: Genesis
    rounds: int


def write_world(place: Place, num_values: int, rounds: int, asleep: tuple[int, ...]) -> World:
    """Fill ``place.folder`` as a donor's after ``rounds``; ``asleep-N`` beside it lacks the last N of them."""
    spec = spec_of("join", place, wire_codec=WIRE_CODEC, status_interval_s=1.0)
    identities = [identity_of(place, donor) for donor in range(DONORS)]
    rng = np.random.default_rng(0)
    shard = Shard(spec, 0, rng.standard_normal(num_values, np.float32))
    genesis = genesis_of(spec, [identity.public_key for identity in identities], shard)
    voters = [identity for identity in identities if identity.public_key in genesis.voters]
    chunks = ChunkStore(place.folder / "chunks", DISK_BYTES)
    ledger = Ledger(place.folder / "shard-0", genesis_head(genesis, 0), chunks, LedgerOptions(archive=True))
    for number in range(1, rounds + 1):
        record, parts = _record(shard, ledger.head, voters, rng)
        shard.apply(record, parts)
        commit = _commit(record, ledger.head, voters)
        ledger.append(commit, next_head(ledger.head, commit.record, record), parts)
        if number in {rounds - missed for missed in (*asleep, 1)}:
            ledger.save_state(number, shard)
        for missed in asleep:
            if number == rounds - missed:
                shutil.copytree(place.folder, place.folder.parent / f"asleep-{missed}", copy_function=os.link)
    return World(spec=spec, genesis=genesis, rounds=rounds)


def _record(
    shard: Shard, head: LogHead, voters: list[Identity], rng: np.random.Generator
) -> tuple[Record, dict[bytes, bytes]]:
    members = [Member(peer_key=voter.public_key, contributes=True) for voter in voters]
    record = Record(
        round=head.round + 1,
        log_digest=head.log_digest,
        state_digest=shard.state_digest,
        codec=shard.codec.name,
        next_voters=list(head.voters),
        total_tokens=head.total_tokens + ROUND_TOKENS,
        opened_by=to_message((1, voters[0].public_key)),
    )
    parts = {}
    for part in split_parts(members, {}, shard.num_slices):
        values = part_values(part.first_slice, part.num_slices, shard.num_values)
        noise = rng.standard_normal(values.stop - values.start, np.float32) * np.float32(1e-3)
        data = shard.codec.encode(noise)
        result = PartResult(first_slice=part.first_slice, num_slices=part.num_slices, size_bytes=len(data))
        result.digest = sha256(data)
        result.shares.append(Share(peer_key=voters[0].public_key, weight_tokens=ROUND_TOKENS, norm=1e6))
        result.reducer = voters[0].public_key
        signed = averages.payload(record, result)
        result.signature = voters[0].sign(averages.AVERAGE_CONTEXT, head.run_id, signed).signature
        record.parts.append(result)
        parts[result.digest] = data
    return record, parts


def _commit(record: Record, head: LogHead, voters: list[Identity]) -> Commit:
    raw = record.SerializeToString(deterministic=True)
    vote = Vote(round=record.round, ballot=record.opened_by, record_digest=sha256(raw)).SerializeToString()
    return Commit(record=raw, votes=[voter.sign(VOTE_CONTEXT, head.run_id, vote) for voter in voters])
