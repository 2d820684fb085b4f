"""How much energy training took: an estimate from what the record of a run holds, never a measurement.

Decides the power of a device by what peers call it, and the factors. Seconds are credited tokens over reported
tokens/s, and no more than the time for which the coordinator has known the peer, so time that nobody counted (start,
waiting, lost work) is not in them; power is the device's rated power, so it is rather too high. Factors are
codecarbon's for when it is offline; a test compares them with its files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from swarm.run_record import DeviceUse, Energy

WATTS_PER_CPU_THREAD = 4.0  # codecarbon: DEFAULT_POWER_PER_CORE
CO2_G_PER_KWH = 475.0  # codecarbon: world average, where the country is unknown
DEFAULT_CPU_WATTS = 85.0  # codecarbon: POWER_CONSTANT
# Rated board power, from the makers' data sheets; the first name that the device's contains counts.
GPU_WATTS = (
    ("H200", 700.0),
    ("H100", 700.0),
    ("A100", 400.0),
    ("L40", 300.0),
    ("L4", 72.0),
    ("A10", 150.0),
    ("V100", 300.0),
    ("T4", 70.0),
    ("RTX 5090", 575.0),
    ("RTX 5080", 360.0),
    ("RTX 5070", 250.0),
    ("RTX 4090", 450.0),
    ("RTX 4080", 320.0),
    ("RTX 4070", 200.0),
    ("RTX 4060", 115.0),
    ("RTX 3090", 350.0),
    ("RTX 3080", 320.0),
    ("RTX 3070", 220.0),
    ("RTX 3060", 170.0),
    ("RTX 2080", 250.0),
    ("GTX 1080", 180.0),
    ("Apple", 60.0),
)
UNKNOWN_GPU_WATTS = 300.0
MIN_BELIEVABLE_TOKENS_PER_S = 1.0  # peers that have just begun, or lie, report less
METHOD = (
    "estimate: tokens that the signed log credits, over the tokens/s that each peer reported (for at most as long as "
    "the coordinator knew it), times the rated power of its device "
    f"({WATTS_PER_CPU_THREAD:g} W per CPU thread and {DEFAULT_CPU_WATTS:g} W for unknown CPUs as codecarbon "
    f"assumes, board power for GPUs, {UNKNOWN_GPU_WATTS:g} W for unknown ones); CO2 by codecarbon's offline world "
    f"average of {CO2_G_PER_KWH:g} g/kWh. Not measured; hosts, networks, the coordinator and lost work are left out."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerWork:
    """What is known of one peer: tokens by the log, device and speed by its own report ("" and 0: none).

    ``known_s``: between the first and the last time that the coordinator heard of it.
    """

    tokens: int
    device: str
    tokens_per_s: float
    known_s: float = math.inf


def watts_of(device: str) -> float:
    """Rated power of what `peer.training.device.describe` calls a device."""
    cpu = re.match(r"CPU, ([0-9]{1,4}) thread", device)
    if cpu:
        return WATTS_PER_CPU_THREAD * int(cpu[1])
    if device.startswith("CPU"):
        return DEFAULT_CPU_WATTS
    return next((watts for name, watts in GPU_WATTS if name in device), UNKNOWN_GPU_WATTS)


def estimate(work: Iterable[PeerWork]) -> Energy:
    """Energy and CO2 of all peers, by device; the same for the same peers in any order."""
    counts: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    unknown = 0
    for peer in work:
        if not peer.device or not peer.tokens_per_s >= MIN_BELIEVABLE_TOKENS_PER_S:
            unknown += peer.tokens
        elif peer.tokens:
            counts[peer.device] = counts.get(peer.device, 0) + 1
            seconds.setdefault(peer.device, []).append(min(peer.tokens / peer.tokens_per_s, peer.known_s))
    devices = tuple(
        DeviceUse(
            device=name, num_peers=counts[name], training_s=round(sum(sorted(seconds[name])), 1), watts=watts_of(name)
        )
        for name in sorted(counts)
    )
    kwh = sum(use.training_s * use.watts for use in devices) / 3_600_000
    return Energy(
        devices=devices,
        kwh=round(kwh, 6),
        co2_kg=round(kwh * CO2_G_PER_KWH / 1000, 6),
        unknown_tokens=unknown,
        method=METHOD,
    )
