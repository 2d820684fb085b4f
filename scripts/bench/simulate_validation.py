"""Simulated against measured: the same models of hops and rounds, set to what the benchmarks ran.

Pipelines: the processor seconds of a microbatch come from the one peer that held the whole model, and are cut by the
operations of each span; what a hop costs its two peers is measured apart (docs/benchmarks.md, "What the transport
costs"). Nothing is taken from the cells that are predicted. Rounds: processor seconds and bytes come from each cell,
its seconds are predicted; shorter ones than `LEAST_VALUES` are left out, as their processor seconds are mostly waiting.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from simulate_hops import Route, Station, simulate
from simulate_rounds import Member, Round, round_seconds

LEAST_VALUES = 2_000_000
# Processor seconds at each end: of a call, and of a byte there or back; codecs and messages included.
CALL_S, WIRE_S_PER_BYTE = 2.6e-3, 15e-9
# Of a peer's computing with the whole model, in inner steps of 4,096 tokens (docs/benchmarks/step.json).
UPDATE_SHARE = 0.05
LINKS = {
    "loopback": (None, None, 0.0),
    "20/100 Mbit/s": (20e6, 100e6, 0.0),
    "20/100 Mbit/s, 20 ms": (20e6, 100e6, 0.02),
    "100 Mbit/s, 50 ms": (100e6, 100e6, 0.05),
    "1/5 Mbit/s": (1e6, 5e6, 0.0),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """``unit``: tokens/s, or seconds."""

    name: str
    unit: str
    measured: float
    simulated: float

    @property
    def error_percent(self) -> float:
        return 100 * (self.simulated / self.measured - 1)


def pipelines(folder: Path) -> list[Compared]:
    """Every pipeline of ours in ``pipeline.json``; none where that was not run in full yet."""
    path = folder / "pipeline.json"
    if not path.is_file():
        return []
    measured = json.loads(path.read_text())
    cells, settings = measured["cells"], measured["settings"]
    whole = cells["ours, 1 peer(s), loopback"]["tokens_per_s"]
    compared = []
    for name, row in cells.items():
        side, peers, link = name.split(", ", 2)
        number, (who, _, codec) = int(peers.split()[0]), side.partition(" in ")
        if who != "ours" or number == 1:
            continue
        simulated = pipeline_tokens_per_s(settings | {"hop_codec": codec or "int8"}, number, link, whole)
        compared.append(Compared(name=name, unit="tokens/s", measured=row["tokens_per_s"], simulated=simulated))
    return compared


def pipeline_tokens_per_s(settings: dict[str, Any], peers: int, link: str, whole_tokens_per_s: float) -> float:
    from pipeline_task import Task

    from peer.training import model
    from swarm import pipeline_plan

    task = Task(**{field.name: settings[field.name] for field in dataclasses.fields(Task) if field.name in settings})
    numbers = model.measure(task.config(), batch=task.sequences, sequence=task.length, in_bf16=False)
    working = pipeline_plan.Working()
    flops = [pipeline_plan.flops_per_token(numbers, span, working) for span in task.shards(peers)]
    tokens = task.tokens_per_microbatch
    compute_s = tokens / whole_tokens_per_s
    one_way = pipeline_plan.hop_bytes(task.hidden, task.hop_codec) * tokens
    up_bps, down_bps, delay_s = LINKS[link]
    stations = []
    for index, mine in enumerate(flops):
        share = mine / sum(flops)
        ends = (index > 0) + (index + 1 < peers)
        hop_s = ends * (CALL_S + 2 * one_way * WIRE_S_PER_BYTE) / task.cpu_share
        computing_s = compute_s * share * (1 - UPDATE_SHARE) + hop_s
        stations.append(
            Station(
                shard=index,
                next_shard=index + 1 if index + 1 < peers else None,
                forward_s=computing_s / 3,
                backward_s=computing_s * 2 / 3,
                step_s=compute_s * share * UPDATE_SHARE * task.step_microbatches,
                up_bps=up_bps,
                down_bps=down_bps,
                in_flight=task.max_in_flight,
            )
        )
    route = Route(
        tokens=tokens,
        onward_bytes=one_way + pipeline_plan.TOKEN_ID_BYTES * tokens,
        back_bytes=one_way,
        delay_s=delay_s,
        step_microbatches=task.step_microbatches,
        timeout_s=task.timeout_s,
        drain_s=30.0,
    )
    return simulate(stations, route, warm_up_s=60.0, measured_s=600.0).tokens_per_s


def rounds(folder: Path) -> list[Compared]:
    measured = json.loads((folder / "allreduce.json").read_text())
    compared = []
    for cell in measured["cells"]:
        if cell["values"] < LEAST_VALUES:
            continue
        up_bps, down_bps, delay_s = LINKS[cell["link"]]
        # What plain TCP reached there.
        reached = cell["bits_per_s"] / up_bps if up_bps else 1.0
        members = [Member(up_bps=up_bps and up_bps * reached, down_bps=down_bps and down_bps * reached)] * cell["peers"]
        what = Round(
            num_values=cell["values"],
            # As its interfaces counted: one round's missed a contribution.
            bytes_per_value=cell["ours"]["wire_mb"] * 1e6 / (2 * (cell["peers"] - 1) * cell["values"]),
            delay_s=delay_s,
            cores=measured["machine"]["cores"] / cell["peers"],
            disk_share=cell["peers"],
        )
        what = dataclasses.replace(what, wire_ns=what.wire_ns_of(cell["peers"], cell["ours"]["cpu_s"]))
        name = f"round of {cell['peers']}, {cell['values'] / 1e6:.0f} M values, {cell['link']}"
        simulated = round_seconds(members, what)
        compared.append(Compared(name=name, unit="s", measured=cell["ours"]["seconds"], simulated=simulated))
    return compared
