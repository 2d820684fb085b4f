"""Witnesses of checkpoints: which attestations are kept, who lives, and whether enough of those agree.

Decides by the recorded log who may be a witness of a round: seed peers, contributors of the round and the voters that
it named. Who attested a shard's state lives there; so does, for a while after the round, who was heard lately and is
not leaving. Attestations that contradict each other are an incident that names who signed what. The functions that take
a `Store` and write run on the writer's thread.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from coordinator import incidents
from coordinator.published import AttestationRow
from coordinator.run import Run
from coordinator.store import Store
from swarm import digest, schedule, witness
from swarm.errors import NotAdmitted, NotFound, ProtocolError
from swarm.log import tokens_by_peer
from swarm.manifest import CheckpointManifest
from swarm.proto.checkpoint_pb2 import Attestation, ShardReplicas, Witnesses
from swarm.proto.common_pb2 import Signed
from swarm.proto.round_pb2 import Commit, Record

# Peers report every 10 s and at every commit; a call may take 20 s.
SILENT_AFTER_MS = 40_000
# A replica that took over a later state (after a crash, say) cannot attest this one any more: nobody waits for ever.
ATTEST_WITHIN_MS = 300_000
_MAX_STATEMENTS_PER_PEER = 4
_MAX_COUNT = 2**63 - 1
_logger = logging.getLogger(__name__)


def attest(run: Run, store: Store, signed: Signed, now_unix_ms: int) -> None:
    """Keep what an admitted replica says about a recorded checkpoint round; asked again, nothing changes.

    What others say, who by the log did not hold its state, is passed over: they would crowd out the replicas.
    Raises `SignatureError`, `ProtocolError`, `NotAdmitted`, and `NotFound` while the round is not recorded.
    """
    attestation = witness.parse_attestation(signed, run.run_id)
    peer = store.peer(signed.signer)
    if peer is None or peer.admitted_until_unix_ms <= now_unix_ms:
        raise NotAdmitted("only admitted peers attest", "ask for admission first, or again")
    is_believable = attestation.round <= _MAX_COUNT and attestation.shard < run.spec.num_shards
    row = store.round(0, attestation.round) if is_believable else None  # whose log says when the run ends
    if row is None or store.round(attestation.shard, row.round) is None:
        raise NotFound(f"{witness.named(attestation)} is not recorded yet", "record its commit first")
    if not schedule.is_checkpoint_round(run.spec, row.round, row.total_tokens):
        raise ProtocolError(f"round {row.round} has no checkpoint")
    if signed.signer not in _replicas(run, store, row.round):
        return
    kept = AttestationRow(
        round=row.round,
        peer_key=signed.signer,
        digest=digest.sha256(signed.payload),
        signed=signed.SerializeToString(deterministic=True),
    )
    store.published.add_attestation(kept, _MAX_STATEMENTS_PER_PEER * run.spec.num_shards)
    _note_disagreement(run, store, attestation, now_unix_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hearing:
    """Since when somebody must have been heard to be waited for, and what the time is."""

    now_unix_ms: int
    silent_before_unix_ms: int


def gather(
    run: Run, store: Store, checkpoint: CheckpointManifest, manifest_digest: bytes, hearing: Hearing
) -> Witnesses:
    """The quorum behind a manifest that the log bears out; `NotFound` while too few have attested its state.

    Each shard has a quorum of its own.
    """
    expected = [witness.said(attestation) for attestation in witness.attestations_of(checkpoint)]
    known = _replicas_by_shard(run, store, checkpoint.round)
    agreeing: list[dict[bytes, Signed]] = [{} for _ in expected]  # by signer: one may say the same in several ways
    attested: list[set[bytes]] = [set() for _ in expected]
    for signed, attestation in _kept(run, store, checkpoint.round):
        attested[attestation.shard].add(signed.signer)
        if signed.signer in known[attestation.shard] and witness.said(attestation) == expected[attestation.shard]:
            agreeing[attestation.shard].setdefault(signed.signer, signed)
    live = [
        of_shard & (attested[shard] | _awaited(run, store, checkpoint.round, shard, hearing))
        for shard, of_shard in enumerate(known)
    ]
    wanted = [witness.needed(len(lived), run.spec.checkpoints) for lived in live]
    for shard, (agree, lived) in enumerate(zip(agreeing, live, strict=True)):
        if len(agree) < wanted[shard]:
            name = f"round {checkpoint.round}" + (f", shard {shard}," if shard else "")
            raise NotFound(
                f"{name} waits for witnesses: {len(agree)} of {len(lived)} live replicas"
                f" attested its state, {wanted[shard]} are needed",
                "it is published once they did; look for an incident in: swarm status",
            )
    replicas = sorted(set().union(*live))
    places = [[replicas.index(peer) for peer in sorted(lived)] for lived in live]
    quorum = Witnesses(
        round=checkpoint.round,
        manifest_digest=manifest_digest,
        replicas=replicas,
        attestations=[signed for of_shard in agreeing for signed in of_shard.values()],
        # Left out where all hold all shards: of one shard, always.
        shards=[ShardReplicas(places=of) for of in places] if any(lived != live[0] for lived in live) else [],
    )
    if quorum.ByteSize() > witness.MAX_WITNESSES_BYTES:  # researchers would refuse it: as many as are needed will do
        enough = [
            signed for of_shard, most in zip(agreeing, wanted, strict=True) for signed in list(of_shard.values())[:most]
        ]
        del quorum.attestations[:]
        quorum.attestations.extend(enough)
    return quorum


def _kept(run: Run, store: Store, round_number: int) -> list[tuple[Signed, Attestation]]:
    limit = witness.MAX_REPLICAS * _MAX_STATEMENTS_PER_PEER * run.spec.num_shards
    rows = store.published.attestations(round_number, limit)
    signed = [Signed.FromString(row.signed) for row in rows]
    return [(item, witness.parse_attestation(item, run.run_id)) for item in signed]


def _note_disagreement(run: Run, store: Store, new: Attestation, now_unix_ms: int) -> None:
    kept = [item for item in _kept(run, store, new.round) if item[1].shard == new.shard]
    text = witness.disagreement([(signed.signer, attestation) for signed, attestation in kept])
    if text is not None:
        _logger.error("incident: %s", text)
        evidence = [signed for signed, _ in kept][: witness.MAX_REPLICAS]
        incidents.tell(store, f"witnesses of {witness.named(new)}", text, now_unix_ms, evidence)


def _replicas(run: Run, store: Store, round_number: int) -> set[bytes]:
    """Who held a state after a round, by the log."""
    return set().union(*_replicas_by_shard(run, store, round_number))


def _replicas_by_shard(run: Run, store: Store, round_number: int) -> list[set[bytes]]:
    found = []
    for shard in range(run.spec.num_shards):
        raw = store.commit(shard, round_number)
        if raw is None:
            raise NotFound(f"round {round_number} is not recorded yet", "record its commit first")
        record = Record.FromString(Commit.FromString(raw).record)
        found.append({*run.seed_peers, *record.next_voters, *tokens_by_peer(record)})
    return found


def _awaited(run: Run, store: Store, round_number: int, shard: int, hearing: Hearing) -> set[bytes]:
    """Who may still attest a shard's state after a round."""
    rows = [store.round(number, round_number) for number in range(run.spec.num_shards)]
    last_unix_ms = max((row.recorded_unix_ms for row in rows if row is not None), default=0)
    if None in rows or last_unix_ms < hearing.now_unix_ms - ATTEST_WITHIN_MS:
        return set()
    heard = {key: store.peer(key) for key in _replicas_by_shard(run, store, round_number)[shard]}
    return {
        key
        for key, peer in heard.items()
        if peer is not None
        and not peer.leaving
        and peer.last_seen_unix_ms >= hearing.silent_before_unix_ms
        and shard in peer.span(run.spec.num_shards)
    }
