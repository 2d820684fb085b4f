"""A round of this project against hivemind's averager and gloo's fp32 all-reduce, on loopback and on slow links.

    .venv/bin/python scripts/bench/allreduce.py [--quick] [--only LINKS] [--repeats N] [--cold-starts N]

Needs root: peers live in network namespaces (`scripts/netlab`). The sides take turns, repeat by repeat; a figure is the
median of its repeats, and each key of the last line is the worst over the grid:

- ``loopback_speedup``: hivemind's seconds over ours, both in 8 bits; ``fraction_of_gloo``: gloo's over ours.
- ``line_rate_fraction``: what a peer must send and receive, 2 (n-1)/n of the encoded vector, over our seconds, as a
  fraction of plain TCP's rate on the same link; large vectors on 100 Mbit/s with 50 ms.
- ``bound_ratio``: our seconds over 2 (n-1)/n x bytes / line rate + 5 one-way delays; the same links, all sizes.
- ``first_round_success``: of cold starts of four peers (fresh keys, daemons and folders), those whose first round
  counted all four.

Our seconds run from the opening of the round until the last peer has it applied and on disk. hivemind's begin when
every peer has found its group, and end, as gloo's, with the last peer's answer. CPU seconds and bytes (of all peers, at
the interface) are of the same span and the moments around it, per repeat.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from averaging_ours import ours
from averaging_place import Place
from averaging_rivals import HIVEMIND_CODEC, gloo, hivemind_averager
from report import print_result

from peer.rounds.codec import CODECS
from scripts.netlab import tcp
from scripts.netlab.lab import Lab, Link, why_not

SIDES = {"ours": ours, "hivemind": hivemind_averager, "gloo": gloo}
LARGE_VALUES = 10**7
LARGEST_ERROR = 0.1
GRACE_S = 20.0
GLOO_PORT = 29500
NO_LINK = "loopback"
FAR = "100 Mbit/s, 50 ms"
LINKS = {
    NO_LINK: Link(),
    "20/100 Mbit/s, 20 ms": Link(up_bps=20e6, down_bps=100e6, delay_s=0.01),
    FAR: Link(up_bps=100e6, down_bps=100e6, delay_s=0.025),
}
ALL = ("gloo", "ours", "hivemind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of the grid; ``sides`` in the order in which they take turns."""

    link: str
    peers: int
    values: int
    sides: tuple[str, ...] = ALL
    repeats: int = 3
    warm_ups: int = 1


M = 10**6
FULL = (
    *(Cell(link=NO_LINK, peers=2, values=v) for v in (M, 10 * M, 50 * M)),
    *(Cell(link=NO_LINK, peers=4, values=v) for v in (M, 10 * M, 50 * M)),
    *(Cell(link=NO_LINK, peers=8, values=v) for v in (M, 10 * M)),
    *(Cell(link="20/100 Mbit/s, 20 ms", peers=n, values=4 * M, repeats=2) for n in (4, 8)),
    *(Cell(link=FAR, peers=4, values=v) for v in (M, 10 * M, 25 * M)),
    *(Cell(link=FAR, peers=8, values=v) for v in (M, 10 * M)),
)
QUICK = (
    Cell(link=NO_LINK, peers=2, values=M, repeats=1, warm_ups=0),
    Cell(link=FAR, peers=2, values=M, repeats=1, warm_ups=0),
)


class Group:
    """The peers of one side, one process each, in the namespaces of a laboratory."""

    def __init__(self, side: str, lab: Lab, cell: Cell, folder: Path) -> None:
        self.side = side
        self._timeout_s = 120.0
        self._pipes = []
        self._processes = []
        context = multiprocessing.get_context("fork")
        for peer in range(cell.peers):
            shared = cell.link == NO_LINK
            place = Place(
                index=peer,
                peers=cell.peers,
                namespace=lab.namespace(0 if shared else peer),
                address="127.0.0.1" if shared else lab.address(peer),
                device="lo" if shared else "eth0",
                folder=folder / side / str(peer),
                timeout_s=self._timeout_s,
            )
            mine, theirs = context.Pipe()
            process = context.Process(target=SIDES[side], args=(theirs, place))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._begin()

    def _begin(self) -> None:
        """The first peer is where the others meet."""
        if self.side == "gloo":
            return  # all at once, when an address is known: see `meet`
        meet = self._ask(0, "begin", "")["meet"]
        for peer in range(1, len(self._pipes)):
            self._pipes[peer].send(("begin", meet))
        self._collect(range(1, len(self._pipes)), "begin")

    def meet(self, address: str) -> None:
        if self.side == "gloo":
            self.all("begin", f"{address}:{GLOO_PORT}")

    def all(self, *command: Any) -> list[dict[str, Any]]:
        """Every peer's answer to a command that all get at once. Raises `RuntimeError` for the first that failed."""
        for pipe in self._pipes:
            pipe.send(command)
        return self._collect(range(len(self._pipes)), command[0])

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

    def _ask(self, peer: int, *command: Any) -> dict[str, Any]:
        self._pipes[peer].send(command)
        return self._collect([peer], command[0])[0]

    def _collect(self, peers: Any, command: str) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self._timeout_s + GRACE_S
        answers: list[dict[str, Any]] = []
        for peer in peers:
            try:
                if not self._pipes[peer].poll(max(0.1, deadline - time.monotonic())):
                    raise RuntimeError(f"{self.side}: peer {peer} did not answer {command}")
                answers.append(self._pipes[peer].recv())
            except (EOFError, OSError) as error:
                raise RuntimeError(f"{self.side}: peer {peer} has ended") from error
        failed = [answer for answer in answers if "error" in answer]
        if failed:
            raise RuntimeError(f"{self.side}: {command}: {failed[0]['error']}\n{failed[0]['trace']}")
        return answers


def average_once(group: Group, cell: Cell) -> dict[str, float]:
    """Seconds, CPU seconds and bytes of one round or all-reduce, checked to have averaged."""
    group.all("arm")
    before = group.all("usage")
    answers = group.all("go")
    after = group.all("usage")
    began = min(answer["began"] for answer in answers if answer["began"] is not None)
    error = max(answer["error_of_average"] for answer in answers)
    if error > LARGEST_ERROR or not all(answer.get("counted", True) for answer in answers):
        raise RuntimeError(f"{group.side}: not an average: error {error:.3f}, {answers}")
    if len({answer.get("state_digest") for answer in answers}) > 1:
        raise RuntimeError(f"{group.side}: unequal states")
    sent = [b["sent_bytes"] - a["sent_bytes"] for a, b in zip(before, after, strict=True)]
    return {
        "seconds": max(answer["ended"] for answer in answers) - began,
        "cpu_s": sum(b["cpu_s"] - a["cpu_s"] for a, b in zip(before, after, strict=True)),
        # On loopback all share one interface.
        "wire_mb": (max(sent) if cell.link == NO_LINK else sum(sent)) / 1e6,
        "error_of_average": error,
    }


def measure_cells(cells: list[Cell], folder: Path) -> list[dict[str, Any]]:
    """All cells of one kind of link and one number of peers: the peers start once."""
    first = cells[0]
    rows = []
    with Lab([LINKS[first.link]] * (1 if first.link == NO_LINK else first.peers)) as lab:
        line = {} if first.link == NO_LINK else tcp.measure(lab.inside(0), lab.inside(1), lab.address(1), 3.0)
        groups: dict[str, Group] = {}
        try:
            for cell in cells:
                rows.append(measure_cell(cell, groups, lab, folder) | line)
                print(row_text(rows[-1]), flush=True)
        finally:
            for group in groups.values():
                group.close()
    return rows


def measure_cell(cell: Cell, groups: dict[str, Group], lab: Lab, folder: Path) -> dict[str, Any]:
    """The sides take turns; one that fails is started anew, and its failure is told."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in cell.sides}
    failures: list[str] = []
    ready: set[str] = set()
    for repeat in range(-cell.warm_ups, cell.repeats):
        for side in cell.sides:
            try:
                if side not in groups:
                    groups[side] = Group(side, lab, cell, folder)
                    groups[side].meet("127.0.0.1" if cell.link == NO_LINK else lab.address(0))
                if side not in ready:
                    groups[side].all("prepare", cell.values)
                    ready.add(side)
                figures = average_once(groups[side], cell)
            except RuntimeError as error:
                failures.append(str(error))
                print(f"# {error}", flush=True)
                ready.discard(side)
                if side in groups:
                    groups.pop(side).close()
                continue
            if repeat >= 0:
                found[side].append(figures)
    sides = {
        side: {name: round(statistics.median(f[name] for f in figures), 4) for name in figures[0]}
        for side, figures in found.items()
        if figures
    }
    return {"link": cell.link, "peers": cell.peers, "values": cell.values, **sides, "failures": failures}


def row_text(row: dict[str, Any]) -> str:
    texts = [f"{row['link']:22} {row['peers']} x {row['values'] / 1e6:4.0f} M"]
    for side in ALL:
        if side in row:
            f = row[side]
            texts.append(f"{side} {f['seconds']:7.3f} s {f['cpu_s']:6.2f} cpu s {f['wire_mb']:7.1f} MB")
    return " | ".join(texts)


def cold_starts(count: int, folder: Path) -> dict[str, Any]:
    """Start four peers that never met, and let them make their first round, ``count`` times."""
    cell = Cell(link="20/100 Mbit/s, 20 ms", peers=4, values=10**5, sides=("ours",))
    seconds, reasons = [], []
    with Lab([LINKS[cell.link]] * cell.peers) as lab:
        for number in range(count):
            group = None
            try:
                group = Group("ours", lab, cell, folder / f"cold-{number}")
                group.all("prepare", cell.values)
                answers = group.all("go")
                if not all(answer["counted"] for answer in answers):
                    raise RuntimeError("somebody's contribution was not counted")
                began = min(answer["began"] for answer in answers if answer["began"] is not None)
                seconds.append(max(answer["ended"] for answer in answers) - began)
            except RuntimeError as error:
                reasons.append(str(error))
                print(f"# cold start {number}: {error}", flush=True)
            finally:
                if group is not None:
                    group.close()
                shutil.rmtree(folder / f"cold-{number}", ignore_errors=True)
    return {
        "cold_starts": count,
        "first_round_success": round(len(seconds) / count, 4) if count else None,
        "first_round_median_s": round(statistics.median(seconds), 3) if seconds else None,
        "first_round_slowest_s": round(max(seconds), 3) if seconds else None,
        "first_round_failures": reasons,
    }


def keys_of(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Each key over its part of the grid; None where nothing of it was measured."""
    near = [row for row in rows if row["link"] == NO_LINK and "ours" in row]
    far = [row for row in rows if row["link"] == FAR and "ours" in row]
    for row in far:
        share = 2 * (row["peers"] - 1) / row["peers"]
        wire_s = share * CODECS["int8"].encoded_size(row["values"]) * 8 / row["bits_per_s"]
        row["line_rate_fraction"] = round(wire_s / row["ours"]["seconds"], 4)
        row["bound_s"] = round(wire_s + 5 * row["round_trip_s"] / 2, 4)
        row["bound_ratio"] = round(row["ours"]["seconds"] / row["bound_s"], 4)
    large = [row["line_rate_fraction"] for row in far if row["values"] >= LARGE_VALUES]
    speedups = [row["hivemind"]["seconds"] / row["ours"]["seconds"] for row in near if "hivemind" in row]
    fractions = [row["gloo"]["seconds"] / row["ours"]["seconds"] for row in near if "gloo" in row]
    return {
        "loopback_speedup": round(min(speedups), 4) if speedups else None,
        "fraction_of_gloo": round(min(fractions), 4) if fractions else None,
        "line_rate_fraction": min(large, default=None),
        "bound_ratio": max((row["bound_ratio"] for row in far), default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small cells and one cold start, under 60 s")
    parser.add_argument("--only", help="cells of links that begin so and of so many peers, such as loopback:4")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--sides", default=",".join(ALL))
    parser.add_argument("--cold-starts", type=int)
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"allreduce: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the laboratory is taken down
    link, _, peers = (arguments.only or "").partition(":")
    cells = [c for c in (QUICK if arguments.quick else FULL) if c.link.startswith(link)]
    cells = [c for c in cells if not peers or str(c.peers) == peers]
    count = arguments.cold_starts if arguments.cold_starts is not None else 1 if arguments.quick else 30
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="allreduce-"))
    sides = tuple(arguments.sides.split(","))
    try:
        cold = cold_starts(count, folder)
        for key in dict.fromkeys((cell.link, cell.peers) for cell in cells):
            chosen = [
                replace(c, sides=sides, repeats=arguments.repeats or c.repeats)
                for c in cells
                if (c.link, c.peers) == key
            ]
            rows += measure_cells(chosen, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {**keys_of(rows), **cold, "cells": rows, "seconds_of_the_benchmark": round(time.monotonic() - started, 1)}
    settings = {
        "repeats": "median, after one that is not counted",
        "hivemind_codec": HIVEMIND_CODEC,
        "codec": "int8",
        "founders": "all peers; a majority of up to 7 votes, each on disk",
        "queue_of_a_link": "50 ms of its rate",
    }
    print_result("allreduce", figures, quick=arguments.quick, settings=settings)


if __name__ == "__main__":
    main()
