"""What a peer can do of its span at most, and what bounds it: `swarm plan`'s figures for this very machine.

Pure. Decides from which figures of the machine that is reckoned: what training and sending showed, and before they did
the tried device and the uplink that is limited or assumed. A downlink is not measured, so it is taken to bound nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peer.training.hosting import Hosting
from swarm import pipeline_plan
from swarm.pipeline_plan import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of a machine by now; 0 and None: not seen yet."""

    max_duty: float
    """the share of time that may be spent training"""
    service_tokens_per_s: float = 0.0
    """of its span, within that share"""
    uplink_bps: int | None = None
    upload_limit_bps: int | None = None
    assumed_uplink_bps: int


def predict(hosting: Hosting, codec: str, seen: Seen) -> dict[str, Any]:
    """Utilisation, tokens/s and what bounds them, with the figures behind it and where each comes from."""
    token_flops = sum(hosting.work[shard] for shard in hosting.span.shards)
    flops, flops_are = hosting.tried_flops * seen.max_duty, "tried"
    if seen.service_tokens_per_s > 0:
        flops, flops_are = seen.service_tokens_per_s * token_flops, "measured"
    uplink_bps, uplink_is = _uplink(seen)
    machine = Machine(flops=flops, uplink_bps=uplink_bps, downlink_bps=math.inf)
    speed = pipeline_plan.speed_of(hosting.choice.plan.span, token_flops, hosting.config.hidden_size, machine, codec)
    return {
        "utilisation": round(speed.utilisation, 4),
        "tokens/s": round(speed.tokens_per_s, 1),
        "bound by": "device" if speed.bound_by == "compute" else speed.bound_by,
        "device tflops": float(f"{flops / 1e12:.3g}"),
        "device is": flops_are,
        "uplink mbit/s": round(uplink_bps / 1e6, 2),
        "uplink is": uplink_is,
    }


def _uplink(seen: Seen) -> tuple[int, str]:
    if seen.uplink_bps is not None:
        return seen.uplink_bps, "measured"
    if seen.upload_limit_bps is not None:
        return seen.upload_limit_bps, "limited"
    return seen.assumed_uplink_bps, "assumed"
