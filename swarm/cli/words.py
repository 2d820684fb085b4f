"""What the commands of a run say, in words and as values for JSON.

Pure. Decides which figures are shown and how they are called; leaves when to `swarm.cli.run`, and looks to
`swarm.cli.output`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.proto.coordinator_pb2 import GetProgressReply, PeerProgress


def progress_values(reply: GetProgressReply) -> dict[str, Any]:
    """Of `swarm status`."""
    from swarm.identity import peer_id_of
    from swarm.placement import lack

    is_over = 0 < reply.target_tokens <= reply.total_tokens
    return {
        "name": reply.name,
        "round": reply.round,
        "total tokens": reply.total_tokens,
        "target tokens": reply.target_tokens,
        "initial validation loss": _loss(reply.initial_validation_loss),
        "tokens/s": round(reply.tokens_per_s),
        "waits for": "" if is_over else lack([shard.replicas for shard in reply.shards]),
        "shards": _shards(reply, is_over),
        "rounds": [
            {
                "round": r.round,
                "tokens": r.total_tokens,
                "train loss": _loss(r.train_loss),
                "validation loss": _loss(r.validation_loss),
                "contributors": len(r.shares),
                "absent parts": r.absent_parts,
                "shares": {peer_id_of(share.peer_key): share.weight_tokens for share in r.shares},
            }
            for r in reply.rounds
        ],
        "peers": [_peer(peer, len(reply.shards)) for peer in reply.peers],
        "incidents": [
            {
                "told (UTC)": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(incident.told_unix_ms / 1000)),
                "what": incident.text,
                "signed by": [peer_id_of(signed.signer) for signed in incident.attestations],
            }
            for incident in reversed(reply.incidents)
        ],
    }


def _loss(value: float) -> float | None:
    return round(value, 4) if value == value else None


def _shards(reply: GetProgressReply, is_over: bool) -> list[dict[str, Any]]:
    from swarm.placement import bottlenecks

    shards = reply.shards
    bounding = bottlenecks([shard.replicas for shard in shards], [shard.service_tokens_per_s for shard in shards])
    return [
        {
            "shard": number,
            "round": shard.round,
            "tokens": shard.total_tokens,
            "replicas": shard.replicas,
            "tokens/s": round(shard.tokens_per_s),
            "could tokens/s": round(shard.service_tokens_per_s),
            "bottleneck": number in bounding,
            "state": _state(shard.replicas, number in bounding, is_over),
        }
        for number, shard in enumerate(shards)
    ]


def _peer(told: PeerProgress, num_shards: int) -> dict[str, Any]:
    from swarm.identity import peer_id_of

    return {
        "peer": peer_id_of(told.peer_key),
        "round": told.round,
        "tokens": told.tokens,
        "hosts": _span(told.first_shard, told.num_shards or num_shards - told.first_shard),
        "tokens/s": round(told.tokens_per_s),
        "could tokens/s": round(told.service_tokens_per_s),
        "sent MB": round(told.bytes_sent / 1e6, 2),
        "received MB": round(told.bytes_received / 1e6, 2),
        "state": "left" if told.leaving else told.state_digest.hex()[:16],
        "state digest": told.state_digest.hex(),
        "leaving": told.leaving,
        "device": told.device,
    }


def _state(replicas: int, is_bottleneck: bool, is_over: bool) -> str:
    if is_over:
        return "ended"
    if not replicas:
        return "waits for a replica"
    return "bottleneck" if is_bottleneck else "trains"


def _span(first: int, number: int) -> str:
    return str(first) if number == 1 else f"{first} to {first + number - 1}"


SHOWN = frozenset(
    {
        *("round", "committed tokens", "target tokens", "my tokens", "tokens/s", "loss", "peers", "sent bytes"),
        *("run tokens/s", "hosts", "can do", "shards", "waits for", "token shards", "archived rounds"),
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
    where, could = f"{shard['shard']}{' here' * shard['here']}", shard["could tokens/s"]
    if not shard["replicas"]:
        return f"{where}: round {shard['round']}, no replica"
    words = f"{where}: round {shard['round']}, {shard['replicas']} replicas, {shard['tokens/s']} tokens/s"
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
