"""Pipelines of spans against whole models and against hivemind's remote experts: tokens/s per unit of compute.

    .venv/bin/python scripts/bench/pipeline.py [--quick]

Every peer is a process under the same CPU quota (a control group holds it and all that it starts) in a network
namespace of its own; needs root. ``efficiency_N_shards`` is tokens/s of a pipeline of N peers, one span each, over N
times that of one peer with the whole model under the same quota, without a link's limit. ``speedup_over_hivemind_moe``
is tokens/s of two spans over those of hivemind's way (two servers and a client, each with that quota) on links of
1/5 Mbit/s, which bound both; with ``_home`` on those of 20/100 Mbit/s, which bound neither. Both sides send 8 bits a
value, and ours with ``_int4`` 4, which hivemind has not.

``--keep FILE --cells TEXT`` measures the cells whose name has TEXT in it, and takes all else from FILE, an earlier
result: each cell says its commit.

``loss_gap_percent``: `pipeline_loss`, which runs first, two processes at once, and needs no links.

Per peer: the share of the window in which something was computed (the rest is waiting: bubbles and wire together), and
the bytes it sent, with the seconds that they take at its link's rate. Last line: one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from averaging_place import Place as Seat
from pipeline_loss import measure_loss
from pipeline_ours import ours
from pipeline_task import Task, remove_quotas
from report import commit_id, print_result

from scripts.netlab.lab import Lab, Link, why_not

FAST, HOME, NARROW = "loopback", "20/100 Mbit/s", "1/5 Mbit/s"
LINKS = {FAST: Link(), HOME: Link(up_bps=20e6, down_bps=100e6), NARROW: Link(up_bps=1e6, down_bps=5e6)}
# A microbatch takes seconds of a narrow link: windows are longer there.
NARROW_TIMES = 2
GRACE_S = 60.0
QUICK = Task(hidden=64, layers=4, heads=2, length=64, warm_up_s=3.0, measured_s=5.0, step_microbatches=8)


def rival(*arguments: Any) -> None:
    """Imported in its own process alone: hivemind takes seconds."""
    import pipeline_rival

    pipeline_rival.rival(*arguments)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """``peers``: with the client, where there is one."""

    side: str
    peers: int
    link: str
    codec: str = "int8"

    @property
    def name(self) -> str:
        codec = f" in {self.codec}" if self.codec != "int8" else ""
        return f"{self.side}{codec}, {self.peers} peer(s), {self.link}"


WHOLE = Cell(side="ours", peers=1, link=FAST)
CELLS = (
    WHOLE,
    *(Cell(side="ours", peers=peers, link=link) for peers in (2, 4) for link in (FAST, HOME)),
    *(Cell(side="ours", peers=2, link=NARROW, codec=codec) for codec in ("int8", "int4")),
    *(Cell(side="hivemind", peers=3, link=link) for link in LINKS),
)
QUICK_CELLS = (WHOLE, Cell(side="ours", peers=2, link=NARROW), Cell(side="hivemind", peers=3, link=NARROW))


class Peers:
    """The processes of one cell, and the commands that they answer."""

    def __init__(self, cell: Cell, lab: Lab, folder: Path, task: Task) -> None:
        self._cell, self._timeout_s = cell, task.timeout_s + GRACE_S
        context = multiprocessing.get_context("fork")
        self._pipes, self._processes = [], []
        for index in range(cell.peers):
            seat = Seat(
                index=index,
                peers=cell.peers,
                namespace=lab.namespace(index),
                address=lab.address(index),
                device="eth0",
                folder=folder / str(index),
                timeout_s=task.timeout_s,
            )
            mine, theirs = context.Pipe()
            process = context.Process(target=ours if cell.side == "ours" else rival, args=(theirs, seat, task))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def begin(self) -> None:
        """Meet at the first peer, then let all take their places: whoever reads the data is the last."""
        meets = [self._ask(0, "begin", "")["meet"]]
        meets += [self._ask(index, "begin", meets[0])["meet"] for index in range(1, len(self._pipes))]
        order = list(range(len(self._pipes)))
        for index in order if self._cell.side == "hivemind" else order[::-1]:
            self._ask(index, "prepare", meets)

    def measure(self, seconds: float) -> list[dict[str, float]]:
        for pipe in self._pipes:
            pipe.send(("measure", seconds))
        return [self._answer(index, "measure") for index in range(len(self._pipes))]

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(("stop",))
            except OSError:
                continue
        deadline = time.monotonic() + 10.0
        for process in self._processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _ask(self, index: int, *command: Any) -> dict[str, Any]:
        self._pipes[index].send(command)
        return self._answer(index, command[0])

    def _answer(self, index: int, command: str) -> dict[str, Any]:
        if not self._pipes[index].poll(self._timeout_s):
            raise RuntimeError(f"peer {index} did not answer {command}")
        answer: dict[str, Any] = self._pipes[index].recv()
        if "error" in answer:
            raise RuntimeError(f"peer {index}: {command}: {answer['error']}\n{answer['trace']}")
        return answer


def measure_cell(cell: Cell, task: Task, folder: Path) -> dict[str, Any]:
    task = dataclasses.replace(task, hop_codec=cell.codec)
    times = NARROW_TIMES if cell.link == NARROW else 1
    with Lab([LINKS[cell.link]] * cell.peers) as lab:
        peers = Peers(cell, lab, folder, task)
        try:
            peers.begin()
            peers.measure(task.warm_up_s * times)
            came = peers.measure(task.measured_s * times)
        finally:
            peers.close()
            remove_quotas()
    tokens_per_s = sum(peer["tokens"] / peer["seconds"] for peer in came)
    tokens = max(1.0, sum(peer["tokens"] for peer in came))
    up_bps = LINKS[cell.link].up_bps
    return {
        "tokens_per_s": round(tokens_per_s, 1),
        "computing_share": [round(peer["computed_s"] / peer["seconds"], 3) for peer in came],
        "sent_bytes_per_token": [round(peer["sent_bytes"] / tokens, 1) for peer in came],
        "wire_share": [
            None if up_bps is None else round(peer["sent_bytes"] * 8 / up_bps / peer["seconds"], 3) for peer in came
        ],
        "commit": commit_id(),
    }


def kept_from(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(cells, figures of the loss) of an earlier result; a cell without a commit is of the result's own."""
    result = json.loads(file.read_text())
    cells = {name: {"commit": result["commit"]} | row for name, row in result["cells"].items()}
    losses = {key: value for key, value in result.items() if key.startswith("loss_")}
    return cells, {"loss_commit": result["commit"]} | losses


def keys_of(rows: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The figures that goals are set for; None for what was not run."""
    rates = {name: row["tokens_per_s"] for name, row in rows.items()}

    def ratio(of: Cell, to: Cell, times: int = 1) -> float | None:
        if not rates.get(of.name) or not rates.get(to.name):
            return None
        return round(rates[of.name] / rates[to.name] / times, 3)

    keys = {f"efficiency_{n}_shards": ratio(Cell(side="ours", peers=n, link=FAST), WHOLE, n) for n in (2, 4)}
    keys |= {f"efficiency_{n}_shards_home": ratio(Cell(side="ours", peers=n, link=HOME), WHOLE, n) for n in (2, 4)}
    for link, suffix in ((NARROW, ""), (HOME, "_home")):
        theirs = Cell(side="hivemind", peers=3, link=link)
        keys[f"speedup_over_hivemind_moe{suffix}"] = ratio(Cell(side="ours", peers=2, link=link), theirs)
    in_4_bits = Cell(side="ours", peers=2, link=NARROW, codec="int4")
    return keys | {
        "speedup_over_hivemind_moe_int4": ratio(in_4_bits, Cell(side="hivemind", peers=3, link=NARROW)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, three cells, under 60 s")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="an earlier result, of which --cells are measured again"
    )
    parser.add_argument("--cells", action="append", default=[], metavar="TEXT", help="part of a cell's name")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"no laboratory: {reason}")
    task, cells = (QUICK, QUICK_CELLS) if options.quick else (Task(), CELLS)
    rows: dict[str, dict[str, Any]] = {}
    if options.keep is not None:
        rows, losses = kept_from(options.keep)
        cells = tuple(cell for cell in cells if any(text in cell.name for text in options.cells))
    else:
        losses = measure_loss(quick=options.quick)
    print(f"loss of the pipeline above whole models: {losses['loss_gap_percent']:+.2f} %\n")
    print(f"{'':36} {'tokens/s':>9}   {'computing':24} {'uplink in use':24} bytes sent a token")
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            rows[cell.name] = measure_cell(cell, task, Path(folder) / str(number))
            print_row(cell.name, rows[cell.name])
    figures = keys_of(rows) | losses | {"cells": rows}
    print_result("pipeline", figures, quick=options.quick, settings=dataclasses.asdict(task))


def print_row(name: str, row: dict[str, Any]) -> None:
    shares = [" ".join("-" if s is None else f"{s:.0%}" for s in row[k]) for k in ("computing_share", "wire_share")]
    sent = " ".join(f"{size:.0f}" for size in row["sent_bytes_per_token"])
    print(f"{name:36} {row['tokens_per_s']:9,.0f}   {shares[0]:24} {shares[1]:24} {sent}", flush=True)


if __name__ == "__main__":
    main()
