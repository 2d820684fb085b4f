"""A newcomer's state from 1, 2 and 4 donors on slow uplinks, ours against hivemind's; and rounds that a peer missed.

    .venv/bin/python scripts/bench/join.py [--quick]

Needs root (`scripts/netlab`). Every donor sends at 50 Mbit/s and the newcomer receives at 1 Gbit/s. The keys:

- ``speedup_4_donors``: our seconds with one donor over those with four, from the question for the log until the state
  is whole and verified; ``speedup_over_hivemind``: the worst of hivemind's seconds (`load_state_from_peers`, tensors of
  as many bytes) over ours with 1, 2 and 4 donors.
- ``catch_up_bytes_per_parameter_per_round``: what a peer that missed 1 or 4 rounds receives at its interface until it
  has them applied, the worst of both. After 16 missed rounds it fetches the state, which is less.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from averaging_place import Place
from join_peer import hivemind_peer, our_peer
from join_world import DONORS, WIRE_CODEC, World, write_world
from report import print_result

from peer.rounds import blocks
from scripts.netlab import tcp
from scripts.netlab.lab import Lab, Link, why_not

DONOR, NEWCOMER = Link(up_bps=50e6, down_bps=1e9), Link(up_bps=100e6, down_bps=1e9)
MISSED = (1, 4, 16)
REPLAYED = (1, 4)
TIMEOUT_S = 120.0


class Peers:
    """Processes that hold donors, and one newcomer at a time in the last namespace."""

    def __init__(self, lab: Lab, root: Path) -> None:
        self._lab, self._root = lab, root
        self._context = multiprocessing.get_context("fork")
        self._running: list[tuple[Any, Any]] = []

    def place(self, index: int, folder: str) -> Place:
        return Place(
            index=index,
            peers=DONORS + 1,
            namespace=self._lab.namespace(index),
            address=self._lab.address(index),
            device="eth0",
            folder=self._root / folder,
            timeout_s=TIMEOUT_S,
            begins_anew=False,
        )

    def start(self, target: Callable[..., None], place: Place, *arguments: Any) -> Any:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(theirs, place, *arguments))
        process.start()
        theirs.close()
        self._running.append((process, mine))
        return mine

    def stop(self, pipe: Any) -> None:
        process = next(process for process, one in self._running if one is pipe)
        pipe.send(("stop",))
        process.join(10.0)
        process.kill()
        process.join()
        self._running.remove((process, pipe))

    def close(self) -> None:
        for _, pipe in list(self._running):
            self.stop(pipe)


def ask(pipe: Any, *command: Any) -> dict[str, Any]:
    pipe.send(command)
    if not pipe.poll(2 * TIMEOUT_S):
        raise RuntimeError(f"no answer to {command}")
    answer: dict[str, Any] = pipe.recv()
    if "error" in answer:
        raise RuntimeError(f"{command}: {answer['error']}\n{answer['trace']}")
    return answer


def start_donors(peers: Peers, target: Callable[..., None], count: int, *arguments: Any) -> tuple[list[Any], str]:
    """Donors one after the other, and where they are met."""
    pipes, meet = [], ""
    for donor in range(count):
        pipes.append(peers.start(target, peers.place(donor, str(donor)), *arguments))
        where = ask(pipes[-1], "begin", meet)["meet"]
        meet = meet or where
    return pipes, meet


def newcomer(
    peers: Peers, lab: Lab, target: Callable[..., None], folder: str, meet: str, donors: int, *arguments: Any
) -> dict[str, float]:
    """Seconds and received bytes of one that comes, by what it does."""
    pipe = peers.start(target, peers.place(DONORS, folder), *arguments)
    found: dict[str, float] = {}
    try:
        ask(pipe, "begin", meet)
        ask(pipe, "meet", donors)
        for deed in ("obtain", "replay") if target is our_peer else ("obtain",):
            _, before = lab.wire_bytes(DONORS)
            found |= {f"{deed}_{name}": value for name, value in ask(pipe, deed).items()}
            found[f"{deed}_bytes"] = lab.wire_bytes(DONORS)[1] - before
    finally:
        peers.stop(pipe)
        shutil.rmtree(peers.place(DONORS, folder).folder, ignore_errors=True)
    return found


def ours(lab: Lab, root: Path, world: World, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """A state from so many donors; then rounds that were missed, from all four."""
    rows = []
    for count in counts:
        peers = Peers(lab, root)
        try:
            pipes, meet = start_donors(peers, our_peer, count, world)
            for pipe in pipes:
                ask(pipe, "hold")
            rows.append({"side": "ours", "donors": count, "missed": None})
            rows[-1] |= newcomer(peers, lab, our_peer, "newcomer", meet, count, world)
            print(row_text(rows[-1]), flush=True)
            for missed in MISSED if count == DONORS else ():
                rows.append({"side": "ours", "donors": count, "missed": missed})
                rows[-1] |= newcomer(peers, lab, our_peer, f"asleep-{missed}", meet, count, world)
                print(row_text(rows[-1]), flush=True)
        finally:
            peers.close()
    return rows


def theirs(lab: Lab, root: Path, sizes: tuple[int, ...], counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """hivemind's state of as many bytes."""
    rows = []
    for count in counts:
        peers = Peers(lab, root / "hivemind")
        try:
            _, meet = start_donors(peers, hivemind_peer, count, sizes)
            rows.append({"side": "hivemind", "donors": count, "missed": None})
            rows[-1] |= newcomer(peers, lab, hivemind_peer, "newcomer", meet, count, sizes)
            print(row_text(rows[-1]), flush=True)
        finally:
            peers.close()
    return rows


def row_text(row: dict[str, Any]) -> str:
    what = "a state" if row["missed"] is None else f"{row['missed']} missed"
    text = f"{row['side']:8} {row['donors']} donors {what:9}: {row['obtain_seconds']:6.2f} s"
    text += f" {row['obtain_bytes'] / 1e6:7.1f} MB"
    if "replay_seconds" in row:
        text += f" (the state after {row['obtain_round']}), then replayed in {row['replay_seconds']:6.2f} s"
        text += f" {row['replay_bytes'] / 1e6:7.1f} MB"
    return text


def keys_of(rows: list[dict[str, Any]], num_values: int) -> dict[str, float]:
    """The figures that the goals name."""
    seconds = {(row["side"], row["donors"]): row["obtain_seconds"] for row in rows if row["missed"] is None}
    missed = {row["missed"]: row for row in rows if row["missed"] is not None}
    received = {m: missed[m]["obtain_bytes"] + missed[m]["replay_bytes"] for m in missed}
    per_round = {m: received[m] / (num_values * m) for m in received}
    counts = sorted({row["donors"] for row in rows})
    return {
        "speedup_4_donors": round(seconds["ours", 1] / seconds["ours", DONORS], 4),
        "speedup_over_hivemind": round(min(seconds["hivemind", n] / seconds["ours", n] for n in counts), 4),
        "catch_up_bytes_per_parameter_per_round": round(max(per_round[m] for m in REPLAYED), 4),
        **{f"catch_up_{m}_bytes_per_parameter_per_round": round(per_round[m], 4) for m in missed},
        **{f"catch_up_{m}_s": round(missed[m]["obtain_seconds"] + missed[m]["replay_seconds"], 3) for m in missed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small state, under 60 s")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"join: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the laboratory is taken down
    num_values = 10**6 if arguments.quick else 25 * 10**6
    counts = (1, DONORS) if arguments.quick else (1, 2, DONORS)
    momentum_values = blocks.size_bytes(num_values) // 4  # as many bytes as fp32 values
    started, load = time.monotonic(), os.getloadavg()[0]
    root = Path(tempfile.mkdtemp(prefix="join-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        lab = stack.enter_context(Lab([DONOR] * DONORS + [NEWCOMER]))
        line = tcp.measure(lab.inside(0), lab.inside(DONORS), lab.address(DONORS), 2.0)
        first = Peers(lab, root).place(0, "0")
        world = write_world(replace(first, begins_anew=True), num_values, max(MISSED) + 1, MISSED)
        for donor in range(1, DONORS):
            shutil.copytree(root / "0", root / str(donor), copy_function=os.link)
        print(f"# the past is written: {time.monotonic() - started:.0f} s", flush=True)
        rows = ours(lab, root, world, counts) + theirs(lab, root, (num_values, momentum_values), counts)
    figures = {**keys_of(rows, num_values), "rows": rows, "line_bits_per_s": round(line["bits_per_s"])}
    figures |= {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    figures["seconds_of_the_benchmark"] = round(time.monotonic() - started, 1)
    settings = {
        "values": num_values,
        "state_bytes": 4 * num_values + blocks.size_bytes(num_values),
        "donor_up_bps": DONOR.up_bps,
        "newcomer_down_bps": NEWCOMER.down_bps,
        "codec": WIRE_CODEC,
    }
    print_result("join", figures, quick=arguments.quick, settings=settings)


if __name__ == "__main__":
    main()
