"""Publication: which checkpoint gets the publication key's signature.

Decides by the recorded log and the replicas' attestations: a seed peer's manifest is signed when it says what the
commits say about its round, and a quorum of live replicas witnessed its state (`coordinator.witnesses`). Leaves the
files themselves to the seed peer, which assembled them, and to researchers, who verify them.
"""

from __future__ import annotations

from coordinator import records, vouching, witnesses
from coordinator.contributions import number_or_nan
from coordinator.published import CheckpointRow
from coordinator.run import Run
from coordinator.store import RoundRow, Store
from coordinator.witnesses import Hearing
from swarm import digest, manifest, witness
from swarm.errors import NotFound, SignatureError, VerificationError
from swarm.identity import verify
from swarm.manifest import CheckpointManifest
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication

PUBLISH_CONTEXT = "publish"
MAX_CHECKPOINTS_SHOWN = 1000
MAX_COUNT = 2**63 - 1


def publish(run: Run, store: Store, request: Signed, hearing: Hearing) -> Publication:
    """The manifest in ``request`` and its witnesses, signed by the publication key; asked again, the same answer.

    Raises `SignatureError` for anybody but a seed peer, `NotFound` while its round is not recorded or has too few
    witnesses, and `VerificationError` for a manifest that the log contradicts or whose round has another one already.
    """
    if request.signer not in run.seed_peers:
        raise SignatureError("only a seed peer publishes")
    payload = verify(request, PUBLISH_CONTEXT, run.run_id)
    checkpoint = manifest.parse(payload)
    if checkpoint.round > MAX_COUNT or checkpoint.size_bytes > MAX_COUNT:
        raise VerificationError("the manifest's round or size is not believable")
    if len(checkpoint.states) != run.spec.num_shards:
        raise VerificationError(f"a manifest of {len(checkpoint.states)} shards; the run has {run.spec.num_shards}")
    for shard in range(run.spec.num_shards):
        next_round = store.round(shard, checkpoint.round + 1)
        row = store.round(shard, checkpoint.round)
        check(run, checkpoint, row, next_round.state_digest if next_round else None, shard)
    manifest_digest = digest.sha256(payload)
    published = store.published.checkpoint(checkpoint.round)
    if published is None:
        records.check(store, checkpoint)
        quorum = witnesses.gather(run, store, checkpoint, manifest_digest, hearing)
        signed_quorum = run.publish(witness.WITNESSES_CONTEXT, quorum.SerializeToString(deterministic=True))
        published = CheckpointRow(
            round=checkpoint.round,
            total_tokens=checkpoint.total_tokens,
            size_bytes=checkpoint.size_bytes,
            manifest_digest=manifest_digest,
            published_unix_ms=hearing.now_unix_ms,
            signed_manifest=run.publish(manifest.CONTEXT, payload).SerializeToString(),
            signed_witnesses=signed_quorum.SerializeToString(),
        )
        # What researchers would refuse must not take the round's place: it is published once.
        vouching.publication_of(run, published).verified(run.run_id, run.spec)
        vouching.add(run, store, published)
    elif published.manifest_digest != manifest_digest:
        raise VerificationError(f"round {checkpoint.round} is published with another manifest")
    return vouching.publication_of(run, published)


def check(
    run: Run, checkpoint: CheckpointManifest, row: RoundRow | None, next_state_digest: bytes | None, shard: int = 0
) -> None:
    """Refuse a manifest that contradicts the run or the log of ``shard``.

    ``row``: the manifest's round as recorded; ``next_state_digest``: what the next commit, where there is one, says
    that its round started from.
    """
    if checkpoint.run_id != run.run_id.hex() or checkpoint.run_name != run.spec.name:
        raise VerificationError("the manifest belongs to another run")
    if checkpoint.data_manifest_digest != run.spec.data.manifest_digest:
        raise VerificationError("the manifest names other data than the run's")
    if row is None:
        raise NotFound(f"round {checkpoint.round} is not recorded yet", "record its commit first")
    state = checkpoint.states[shard]
    if shard == 0 and checkpoint.total_tokens != row.total_tokens:
        raise VerificationError(f"round {row.round}: the manifest's tokens are not the log's")
    if state.log_digest != row.log_digest.hex():
        raise VerificationError(f"round {row.round}: the manifest's log digest is not the log's")
    if next_state_digest is not None and state.state_digest != next_state_digest.hex():
        raise VerificationError(f"round {row.round}: the manifest's state is not the one that the voters signed")


def list_checkpoints(store: Store) -> pb.ListCheckpointsReply:
    """Published checkpoints, newest first."""
    rows = store.published.newest_checkpoints(MAX_CHECKPOINTS_SHOWN)
    evaluated = store.published.evaluated_rounds(MAX_CHECKPOINTS_SHOWN)
    return pb.ListCheckpointsReply(checkpoints=[_info(row, store, evaluated.get(row.round, 0)) for row in rows])


def get_checkpoint(run: Run, store: Store, round_number: int) -> Publication:
    """The publication of a round, 0 meaning the newest; `NotFound` where there is none."""
    newest = store.published.newest_checkpoints(1)
    row = (newest[0] if newest else None) if round_number == 0 else _of_round(store, round_number)
    if row is None:
        what = f"no checkpoint of round {round_number}" if round_number else "no checkpoint yet"
        raise NotFound(f"{what} is published", "list the checkpoints, or try again later")
    return vouching.publication_of(run, row)


def _of_round(store: Store, round_number: int) -> CheckpointRow | None:
    return store.published.checkpoint(round_number) if round_number <= MAX_COUNT else None


def _info(row: CheckpointRow, store: Store, num_evaluations: int) -> pb.CheckpointInfo:
    losses = store.losses(row.round, row.round).get(row.round)
    return pb.CheckpointInfo(
        round=row.round,
        total_tokens=row.total_tokens,
        size_bytes=row.size_bytes,
        manifest_digest=row.manifest_digest,
        validation_loss=number_or_nan(losses.validation if losses else None),
        published_unix_ms=row.published_unix_ms,
        num_evaluations=num_evaluations,
    )
