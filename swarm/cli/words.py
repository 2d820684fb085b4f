"""What the commands of a run say, in words and as values for JSON.

Pure. Decides which figures are shown and how they are called; leaves when to `swarm.cli.run`, and looks to
`swarm.cli.output`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.proto.coordinator_pb2 import GetProgressReply


def progress_values(reply: GetProgressReply) -> dict[str, Any]:
    """Of `swarm status`."""
    from swarm.identity import peer_id_of

    def loss(value: float) -> float | None:
        return round(value, 4) if value == value else None

    return {
        "name": reply.name,
        "round": reply.round,
        "total tokens": reply.total_tokens,
        "target tokens": reply.target_tokens,
        "initial validation loss": loss(reply.initial_validation_loss),
        "shards": [
            {
                "shard": number,
                "round": shard.round,
                "tokens": shard.total_tokens,
                "replicas": shard.replicas,
                "tokens/s": round(shard.tokens_per_s),
                "state": "trains" if shard.replicas else "waits for a replica",
            }
            for number, shard in enumerate(reply.shards)
        ],
        "rounds": [
            {
                "round": r.round,
                "tokens": r.total_tokens,
                "train loss": loss(r.train_loss),
                "validation loss": loss(r.validation_loss),
                "contributors": len(r.shares),
                "absent parts": r.absent_parts,
                "shares": {peer_id_of(share.peer_key): share.weight_tokens for share in r.shares},
            }
            for r in reply.rounds
        ],
        "peers": [
            {
                "peer": peer_id_of(p.peer_key),
                "round": p.round,
                "tokens": p.tokens,
                "tokens/s": round(p.tokens_per_s),
                "sent MB": round(p.bytes_sent / 1e6, 2),
                "received MB": round(p.bytes_received / 1e6, 2),
                "state": "left" if p.leaving else p.state_digest.hex()[:16],
                "state digest": p.state_digest.hex(),
                "leaving": p.leaving,
                "device": p.device,
            }
            for p in reply.peers
        ],
        "incidents": [
            {
                "told (UTC)": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(incident.told_unix_ms / 1000)),
                "what": incident.text,
                "signed by": [peer_id_of(signed.signer) for signed in incident.attestations],
            }
            for incident in reversed(reply.incidents)
        ],
    }


SHOWN = frozenset(
    {
        *("round", "committed tokens", "target tokens", "my tokens", "tokens/s", "loss", "peers", "sent bytes"),
        *("hosts", "can do", "shards", "waits for", "token shards"),
    }
)


def in_words(name: str, value: Any) -> Any:
    """A value as people read it: of several shards each in a few words, and what a peer can do in one line."""
    if name == "can do":
        return _can_do(value)
    if name == "shards":
        return "; ".join(_shard(each) if isinstance(each, dict) else str(each) for each in value)
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _shard(shard: dict[str, Any]) -> str:
    could = shard["could tokens/s"]
    words = f"{shard['shard']}: round {shard['round']}, {shard['replicas']} replicas, {shard['tokens/s']} tokens/s"
    return words + (f" of {could}" if could else "") + (" (bottleneck)" if shard["bottleneck"] else "")


def _can_do(told: dict[str, Any]) -> str:
    """Busy for which share of the time, at most so many tokens/s, bound by what; and how that is known."""
    words = f"{told['tokens/s']:,.0f} tokens/s at most, {told['utilisation']:.0%} busy, bound by the {told['bound by']}"
    device = f"device {told['device tflops']:g} TFLOP/s ({told['device is']})"
    return f"{words}; {device}, uplink {told['uplink mbit/s']:g} Mbit/s ({told['uplink is']})"


def plans(values: dict[str, Any]) -> dict[str, Any]:
    """What a peer will do and use, before it does."""
    spec, options, hosting = values["spec"], values["options"], values["hosting"]
    limit_bps = options.upload_limit_bps
    return {
        "run": spec.name,
        "run id": spec.run_id.hex(),
        "peer id": values["peer id"],
        "will": "train" if options.trains else "keep and serve the run",
        "model": f"{spec.model.family}, {spec.total_tokens} tokens in all",
        "folder": str(options.home.folder),
        "disk limit": f"{options.disk_bytes / 2**30:.1f} GiB",
        "upload": "no limit" if limit_bps is None else f"at most {limit_bps / 1e6:.1f} Mbit/s",
        "time": f"{options.limits.max_duty * 100:.0f} %",
        **({} if hosting is None else {"memory": hosting.choice.reason}),
    }
