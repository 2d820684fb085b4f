"""What a peer tells of itself: to the person in front of it, to the coordinator, and to other peers in its statuses.

Decides which figures, and that those of training are as they are now. Leaves when to `peer.runtime` and
`peer.reporting`, and what a status says besides to `peer.rounds.member`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peer.checkpoints.backfilling import Backfill
from peer.hosted import HostedShards
from peer.joining import USUAL_UPLOAD_BPS, Joined, own_addresses
from peer.predicting import Seen, predict
from peer.rounds.member import Words
from peer.token_mirror import TokenMirror
from peer.training.between_steps import Stats
from peer.training.feeding import Training
from swarm.placement import lack
from swarm.proto.coordinator_pb2 import ReportPayload


@dataclass(slots=True, kw_only=True)
class Telling:
    """``training``: None on a seed peer, which alone has a ``backfill``; ``mirror``: of one that fetches its data."""

    joined: Joined
    hosted: HostedShards
    training: Training | None
    mirror: TokenMirror | None
    backfill: Backfill | None
    words: Words
    device: str
    _told: Stats = field(default_factory=Stats)

    @property
    def stats(self) -> Stats:
        return self.training.stats if self.training is not None else Stats()

    def refresh_words(self) -> None:
        """Into what the next statuses say."""
        if self.training is not None:
            stats = self.stats
            self.words.shard_tokens_per_s = {shard: stats.tokens_per_s_of(shard) for shard in self.hosted.shards}
            self.words.service_tokens_per_s = self.training.service_tokens_per_s

    def values(self) -> dict[str, Any]:
        """For the person."""
        stats = self.stats
        sent, received = self.joined.transport.traffic()
        return {
            "round": self.hosted.round,
            "committed tokens": self.hosted.first.head.total_tokens,
            "target tokens": self.joined.run.spec.total_tokens,
            "my tokens": stats.tokens,
            "tokens/s": round(stats.tokens_per_s),
            "loss": stats.last_loss,
            "peers": len(self.hosted.surroundings.peers),
            "sent bytes": sent,
            "received bytes": received,
            "disk bytes": self.joined.chunks.used_bytes,
            **(self.of_shards(stats) if self.joined.run.spec.num_shards > 1 else {}),
            **({"token shards": self.mirror.told} if self.mirror is not None else {}),
            **({"archived rounds": self.backfill.told} if self.backfill is not None and self.backfill.told else {}),
        }

    def of_shards(self, stats: Stats) -> dict[str, Any]:
        shards = self.hosted.progress()
        lacking = lack([shard["replicas"] for shard in shards])
        return {
            "hosts": self.hosted.shards,
            "shards": shards,
            "run tokens/s": shards[0]["tokens/s"],  # every token passes the first one, and once
            "first shard tokens": stats.tokens_of(self.hosted.shards[0]),  # less than "my tokens": some entered later
            **prediction(self.joined, self.training),
            "waits for": lacking or (self.training.waits_for if self.training is not None else ""),
        }

    def report(self) -> ReportPayload:
        """For the coordinator."""
        stats = self.stats
        loss, self._told = stats.mean_loss_since(self._told), stats
        sent, received = self.joined.transport.traffic()
        return ReportPayload(
            round=self.hosted.round,
            train_loss=loss,
            validation_loss=math.nan,
            tokens_per_s=stats.tokens_per_s,
            bytes_sent=sent,
            bytes_received=received,
            sent_unix_ms=int(self.joined.clock() * 1000),
            state_digest=self.hosted.state_digest,
            log_digest=self.hosted.log_digest,
            leaving=self.words.leaving,
            seed_addresses=own_addresses(self.joined.options, self.joined.transport),
            device=self.device,
            first_shard=self.hosted.shards[0],
            num_shards=len(self.hosted.shards),
            service_tokens_per_s=self.words.service_tokens_per_s,
            shard_tokens_per_s=[stats.tokens_per_s_of(shard) for shard in self.hosted.shards] if self.training else (),
        )


def prediction(joined: Joined, training: Training | None = None) -> dict[str, Any]:
    """What this peer can do of its span at most, by what is known by now; nothing where it does not train."""
    if joined.hosting is None:
        return {}
    seen = Seen(
        max_duty=joined.options.limits.max_duty,
        service_tokens_per_s=training.service_tokens_per_s if training is not None else 0.0,
        uplink_bps=joined.transport.uplink_bps(),
        upload_limit_bps=joined.options.upload_limit_bps,
        assumed_uplink_bps=USUAL_UPLOAD_BPS,
    )
    return {"can do": predict(joined.hosting, joined.run.spec.pipeline.hop_codec, seen)}
