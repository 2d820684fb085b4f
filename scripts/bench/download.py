"""A checkpoint from 1 and 4 sources on slow uplinks; killed ten times; with one byte gone bad; and by huggingface_hub.

    .venv/bin/python scripts/bench/download.py [--quick]

Needs root (`scripts/netlab`). Every source sends at 100 Mbit/s and whoever downloads receives at 1 Gbit/s. The keys:

- ``line_rate_fraction``: the checkpoint's bits over the seconds until all of them are in place, each chunk verified,
  over what plain TCP brings on that line (times the number of sources); the worst of one peer (libp2p), one mirror (a
  web server), and two of each at once.
- ``bytes_over_size``: what came in at the downloader's interface, headers included, while it was killed (SIGKILL) at
  ten random points and ended, over the checkpoint's size; from four sources.
- ``chunks_refetched``: how many chunks came again after one byte of a complete download was flipped.

``unlimited`` is the same from one peer and one mirror over links without a rate: what the processor bounds, and so the
line rate from which on a line is not filled on this machine, where both sides share its cores.

Beside it huggingface_hub's `hf_hub_download` from the same web server: its rate, its bytes when killed (at fewer
points: it begins anew each time), and whether it notices the flipped byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from download_side import PORT, REPOSITORY
from report import print_result

from scripts.netlab import tcp
from scripts.netlab.lab import Lab, Link, why_not
from tests.checkpoint_samples import SignedCheckpoint, make_parts, signed_checkpoint

SIDE = Path(__file__).with_name("download_side.py")
SOURCE, TAKER = Link(up_bps=100e6, down_bps=1e9), Link(up_bps=100e6, down_bps=1e9)
WEIGHTS = "model.safetensors"
TIMEOUT_S = 600.0
WATCH_S = 0.05
READY_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The laboratory, the checkpoint that every source holds, and where downloads go."""

    lab: Lab
    folder: Path
    made: Path
    size_bytes: int
    peers: tuple[str, ...]
    mirrors: tuple[str, ...]

    @property
    def taker(self) -> int:
        return len(self.lab.links) - 1


class Side:
    """A process in a namespace that says JSON lines."""

    def __init__(self, lab: Lab, place: int, *words: object) -> None:
        command = [*lab.inside(place), sys.executable, str(SIDE), *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict[str, Any]:
        if self.process.stdout is None:
            raise RuntimeError("no pipe")
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"a process ended with {self.process.wait()} before it said anything")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def start_sources(stack: ExitStack, lab: Lab, made: Path, count: int) -> tuple[list[str], list[str]]:
    """Peers in the first half of the places, web servers in the other."""
    peers, mirrors = [], []
    for place in range(count):
        address = lab.address(place)
        is_peer = place < count // 2
        words = ("peer", made, address, place) if is_peer else ("web", made, address)
        side = Side(lab, place, *words)
        stack.callback(side.kill)
        (peers if is_peer else mirrors).append(side.hear()["ready"])
    return peers, mirrors


def plan_of(world: World, num_peers: int, num_mirrors: int) -> str:
    peers = [[address, number] for number, address in enumerate(world.peers[:num_peers])]
    return json.dumps({"peers": peers, "mirrors": list(world.mirrors[:num_mirrors])})


def ours(world: World, num_peers: int, num_mirrors: int, line_bps: float) -> dict[str, Any]:
    """One download, undisturbed."""
    target = world.folder / f"got-{num_peers}-{num_mirrors}"
    before = world.lab.wire_bytes(world.taker)[1]
    result = fetched(world, target, num_peers, num_mirrors)
    row = {"side": "ours", "peers": num_peers, "mirrors": num_mirrors, "kills": 0}
    row |= rates(world, result["in_place_seconds"], num_peers + num_mirrors, line_bps)
    row |= {"verified_after_s": round(result["seconds"], 2)}
    row["bytes_over_size"] = round((world.lab.wire_bytes(world.taker)[1] - before) / world.size_bytes, 4)
    row["by_source"] = [source["received_bytes"] for source in result["sources"]]
    print(text_of(row), flush=True)
    return row


def unlimited(root: Path, made: SignedCheckpoint) -> list[dict[str, Any]]:
    """One peer, then one mirror, over links that are as fast as the machine."""
    rows = []
    with ExitStack() as stack:
        lab = stack.enter_context(Lab([Link()] * 3))
        peers, mirrors = start_sources(stack, lab, made.folder, 2)
        world = world_of(lab, root, made, peers, mirrors)
        for plan in ((1, 0), (0, 1)):
            result = fetched(world, root / f"fast-{plan[0]}", *plan)
            bits_per_s = 8 * world.size_bytes / result["in_place_seconds"]
            row = {"peers": plan[0], "mirrors": plan[1], "bits_per_s": round(bits_per_s)}
            rows.append(row | {"processor_s": round(result["processor_s"], 2)})
            shutil.rmtree(root / f"fast-{plan[0]}")
            print(f"ours     no limit, {plan[0]} peers {plan[1]} mirrors: {bits_per_s / 1e6:.0f} Mbit/s", flush=True)
    return rows


def world_of(lab: Lab, root: Path, made: SignedCheckpoint, peers: list[str], mirrors: list[str]) -> World:
    return World(
        lab=lab,
        folder=root,
        made=made.folder,
        size_bytes=made.manifest.size_bytes,
        peers=tuple(peers),
        mirrors=tuple(mirrors),
    )


def fetched(world: World, target: Path, num_peers: int, num_mirrors: int) -> dict[str, Any]:
    """What one undisturbed download says of itself."""
    side = Side(world.lab, world.taker, "get", world.made, target, plan_of(world, num_peers, num_mirrors))
    side.hear()
    result = side.hear()
    side.process.wait()
    return result


def rates(world: World, seconds: float, sources: int, line_bps: float) -> dict[str, float]:
    fraction = 8 * world.size_bytes / seconds / (line_bps * sources)
    return {"seconds": round(seconds, 2), "line_rate_fraction": round(fraction, 4)}


def killed(world: World, start: Any, side_name: str, kills: int) -> dict[str, Any]:
    """``start()`` a download again and again, killed when so much has come in; then let it end."""
    rng = random.Random(0)
    points = [rng.random() * world.size_bytes for _ in range(kills)]
    if side_name == "ours":
        points.sort()  # it resumes: each point lies further on; who begins anew passes every point again
    first = world.lab.wire_bytes(world.taker)[1]
    began, done_kills = time.monotonic(), 0
    for point in points:
        base = first if side_name == "ours" else world.lab.wire_bytes(world.taker)[1]
        side = start()
        side.hear()
        while side.process.poll() is None and world.lab.wire_bytes(world.taker)[1] - base < point:
            time.sleep(WATCH_S)
        done_kills += side.process.poll() is None
        side.kill()
    side = start()
    side.hear()
    result = side.hear()
    side.process.wait()
    received = world.lab.wire_bytes(world.taker)[1] - first
    row = {"side": side_name, "kills": done_kills, "seconds": round(time.monotonic() - began, 2)}
    row |= {"bytes_over_size": round(received / world.size_bytes, 4), "path": result.get("path")}
    print(text_of(row), flush=True)
    return row


def flipped(world: World, target: Path) -> dict[str, Any]:
    """One byte of a complete download goes bad; it is downloaded again."""
    path = target / "round-000010" / WEIGHTS
    flip(path, path.stat().st_size // 2)
    before = world.lab.wire_bytes(world.taker)[1]
    result = fetched(world, target, 1, 1)
    received = world.lab.wire_bytes(world.taker)[1] - before
    print(
        f"ours     one byte flipped: {result['chunks_fetched']} chunks came again, {received / 1e6:.1f} MB", flush=True
    )
    return {"chunks": result["chunks_fetched"], "bytes": received}


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def theirs(world: World, line_bps: float, kills: int) -> list[dict[str, Any]]:
    """huggingface_hub from one web server: undisturbed, with a flipped byte, and killed."""
    endpoint = world.mirrors[0]

    def start(folder: str) -> Side:
        return Side(world.lab, world.taker, "hub", endpoint, world.folder / folder, WEIGHTS)

    before = world.lab.wire_bytes(world.taker)[1]
    side = start("hub")
    side.hear()
    result = side.hear()
    side.process.wait()
    received = world.lab.wire_bytes(world.taker)[1] - before
    row = {"side": "huggingface_hub", "peers": 0, "mirrors": 1, "kills": 0, "version": result["version"]}
    row |= rates(world, result["seconds"], 1, line_bps) | {"bytes_over_size": round(received / world.size_bytes, 4)}
    print(text_of(row), flush=True)
    path = Path(result["path"])
    flip(path, path.stat().st_size // 2)
    before = world.lab.wire_bytes(world.taker)[1]
    side = start("hub")
    side.hear()
    side.hear()
    side.process.wait()
    row["noticed_flipped_byte"] = world.lab.wire_bytes(world.taker)[1] - before > 1 << 20
    shutil.rmtree(world.folder / "hub", ignore_errors=True)
    return [row, killed(world, lambda: start("hub-killed"), "huggingface_hub", kills)]


def text_of(row: dict[str, Any]) -> str:
    sources = f"{row['peers']} peers {row['mirrors']} mirrors" if "peers" in row else f"{row['kills']} kills"
    text = f"{row['side']:16} {sources:18} {row['seconds']:7.1f} s, {row['bytes_over_size']:.3f} x the size"
    return text + (f", {row['line_rate_fraction']:.1%} of the line" if "line_rate_fraction" in row else "")


def measure(world: World, line_bps: float, quick: bool) -> dict[str, Any]:
    rows = [ours(world, *plan, line_bps) for plan in ((1, 0), (0, 1), (2, 2))]
    repaired = flipped(world, world.folder / "got-2-2")
    for folder in world.folder.glob("got-*"):
        shutil.rmtree(folder)
    plan = plan_of(world, 2, 2)

    def start() -> Side:
        return Side(world.lab, world.taker, "get", world.made, world.folder / "killed", plan)

    broken = killed(world, start, "ours", 2 if quick else 10)
    shutil.rmtree(world.folder / "killed")
    hub = theirs(world, line_bps, 1 if quick else 3)
    return {
        "line_rate_fraction": min(row["line_rate_fraction"] for row in rows),
        "bytes_over_size": broken["bytes_over_size"],
        "chunks_refetched": repaired["chunks"],
        "huggingface_hub_line_rate_fraction": hub[0]["line_rate_fraction"],
        "huggingface_hub_bytes_over_size": hub[1]["bytes_over_size"],
        "huggingface_hub_noticed_flipped_byte": hub[0]["noticed_flipped_byte"],
        "repair_bytes": repaired["bytes"],
        "rows": [*rows, broken, *hub],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 MB, under 60 s")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"download: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the laboratory is taken down
    num_values = 10**7 if arguments.quick else 25 * 10**7
    started, load = time.monotonic(), os.getloadavg()[0]
    root = Path(tempfile.mkdtemp(prefix="download-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        made = signed_checkpoint(root / "made", make_parts(num_values=num_values))
        print(f"# the checkpoint is written: {time.monotonic() - started:.0f} s", flush=True)
        fast = unlimited(root, made)
        lab = stack.enter_context(Lab([SOURCE] * 4 + [TAKER]))
        line_bps = tcp.measure(lab.inside(0), lab.inside(4), lab.address(4), 4.0)["bits_per_s"]
        peers, mirrors = start_sources(stack, lab, made.folder, 4)
        figures = measure(world_of(lab, root, made, peers, mirrors), line_bps, arguments.quick)
    figures |= {"unlimited": fast, "line_bits_per_s": round(line_bps), "load_before": round(load, 2)}
    figures |= {"load_after": round(os.getloadavg()[0], 2)}
    figures["seconds_of_the_benchmark"] = round(time.monotonic() - started, 1)
    settings = {
        "size_bytes": made.manifest.size_bytes,
        "source_up_bps": SOURCE.up_bps,
        "taker_down_bps": TAKER.down_bps,
        "repository": REPOSITORY,
        "port": PORT,
    }
    print_result("download", figures, quick=arguments.quick, settings=settings)


if __name__ == "__main__":
    main()
