"""The trainer of this peer's span among the others', built of what joining found.

Only wiring. A run of one shard has none of it, see `peer.training.trainer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peer.hosted import HostedShards
from peer.joining import Joined
from peer.span_evaluation import is_wanted
from peer.training.between_steps import BetweenSteps
from peer.training.feeding import Build, Training
from peer.training.layout import slices_of
from peer.training.trainer import Hooks, Limits
from swarm.errors import SwarmError

if TYPE_CHECKING:
    from peer.pipeline.trainer import HostedReplica

MAX_DRAIN_S = 30.0


def span_trainer(joined: Joined, hosted: HostedShards, training: Training) -> Build[HostedReplica]:
    """Makes the trainer of a replica that holds the shards of ``hosted``, for ``training``."""
    from peer.pipeline.evaluation import EvaluationRules
    from peer.pipeline.messages import HopRules, time_for
    from peer.pipeline.trainer import SpanParts, SpanTrainer

    spec, hosting = joined.run.spec, joined.hosting
    if hosting is None:
        raise SwarmError("a peer that does not train has no span to train")
    rules = HopRules(
        sequence_length=spec.data.sequence_length,
        max_sequences=spec.inner.microbatch_sequences,
        width=hosting.config.hidden_size,
        vocab_size=hosting.config.vocab_size,
        codec=spec.pipeline.hop_codec,
    )
    last, shards = hosting.span.last, hosted.shards
    pieces = slices_of([exchange.shard.num_values for exchange in hosted.exchanges])
    later = {shard: slice(piece.start, pieces[-1].stop) for shard, piece in zip(shards, pieces, strict=True)}
    later.pop(shards[0])
    work = {shard: sum(hosting.work[shard:last]) for shard in shards}
    parts = SpanParts(
        transport=joined.transport,
        rules=rules,
        first_shard=hosting.span.first,
        next_shard=last if last < spec.num_shards else None,
        step_microbatches=spec.pipeline.step_microbatches,
        max_in_flight=min(hosting.max_in_flight, spec.pipeline.step_microbatches),
        hosts=hosted.surroundings.hosts,
        is_admitted=hosted.surroundings.is_admitted,
        later=later,
        shares={shard: work[shard] / work[shards[0]] for shard in later},
        evaluation=EvaluationRules(
            anchors=hosted.anchors_after,
            allowance=training.evaluating,
            is_wanted=lambda number: is_wanted(spec, number),
        ),
        timeout_s=time_for(spec.num_shards - hosting.span.first),
        # A snapshot that comes later is of no use to its round.
        drain_s=min(MAX_DRAIN_S, spec.rounds.reduce_timeout_s / 2),
    )

    def build(replica: HostedReplica, hooks: Hooks, limits: Limits) -> BetweenSteps:
        return SpanTrainer(replica, parts, hooks, limits)

    return build
