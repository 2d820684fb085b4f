"""From a publication round to a checkpoint that can be downloaded, and what that costs a peer that trains meanwhile.

    .venv/bin/python scripts/bench/publish.py [--quick]

A peer trains (8-bit replica of a small model, one thread), and meanwhile an anchor of 10 M or 200 M parameters is
offered to the same `CheckpointMaker` that peers run: copied to disk, assembled, hashed, attested, handed in to be
signed. The coordinator stands in this process, so neither its network nor the wait for other replicas is in it.

- ``seconds_to_downloadable``: from the offer until the signed folder lies there and its chunks are served; the larger
  model's, the median over publications. That the last one verifies is checked afterwards, and not counted.
- ``training_cost_percent``: training time lost to a publication (its seconds, less those that the steps made meanwhile
  take while nothing is published, before and after) over the time between two publications. That one is assumed: 10
  rounds (the default) of 60 s. The larger model's. Beside it ``processor_s``: what the publication takes of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_models import Shape, build_model, random_tokens
from report import print_result

from peer.checkpoints.publishing import CheckpointMaker, StateCopy, Template
from peer.checkpoints.verify import verify_folder
from peer.p2p.chunk_store import ChunkStore
from peer.training.int8_replica import Int8Replica
from peer.training.layout import Layout
from peer.training.model import layout_of
from peer.training.trainer import Hooks, Limits, Trainer
from swarm import manifest as manifests
from swarm import run_spec
from swarm.energy import estimate
from swarm.proto.checkpoint_pb2 import Attestation
from swarm.publication import Publication
from swarm.run_record import RunRecord
from swarm.run_spec import Inner
from tests.checkpoint_samples import ORGANIZER, make_parts, publication_of, shard_parts_of

TRAINED = Shape(hidden=128, inner=320, layers=2, heads=4, vocab=1024)
LENGTH = 64
ROWS, COLUMNS = 1000, 1000
INTERVAL_S = 600.0
TIMEOUT_S = 300.0
WARM_STEPS = 10


class StandIn:
    """Signs at once, as a coordinator does that has its quorum."""

    def __init__(self, run_id: bytes) -> None:
        self._run_id = run_id

    async def attest(self, attestation: Attestation) -> None:
        pass

    async def run_record(self, round_number: int) -> bytes:
        return RunRecord(round=round_number, num_peers=2, energy=estimate(())).canonical_bytes()

    async def publish(self, manifest_bytes: bytes) -> Publication:
        return publication_of(manifest_bytes, self._run_id)


def build_trainer() -> Trainer:
    model = build_model(TRAINED)
    replica = Int8Replica(model, layout_of(model), Inner(), torch.device("cpu"))
    tokens = random_tokens(TRAINED, 1, LENGTH)
    hooks = Hooks(next_batch=lambda attempt: tokens, learning_rate=lambda: 1e-4)
    return Trainer(replica, hooks, Limits(num_threads=1))


@dataclass(frozen=True, slots=True)
class Moment:
    """Where clock, trainer and processor time of this process stand."""

    at_s: float
    steps: int
    cpu_s: float

    @classmethod
    def now(cls, trainer: Trainer) -> Moment:
        return cls(time.monotonic(), trainer.stats.steps, time.process_time())

    def until(self, later: Moment) -> Moment:
        return Moment(later.at_s - self.at_s, later.steps - self.steps, later.cpu_s - self.cpu_s)


async def quiet(trainer: Trainer, seconds: float) -> Moment:
    """What the trainer does while nothing is published."""
    began = Moment.now(trainer)
    await asyncio.sleep(seconds)
    return began.until(Moment.now(trainer))


async def warm_up(trainer: Trainer) -> None:
    """The first steps allocate, and take longer."""
    for _ in range(int(TIMEOUT_S / 0.1)):
        if trainer.stats.steps >= WARM_STEPS:
            return
        await asyncio.sleep(0.1)
    raise RuntimeError("the trainer makes no steps")


def copied(anchor: np.ndarray, folder: Path) -> np.ndarray:
    """On disk, as a shard's anchor is copied for those who read it for long."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(memoryview(anchor).cast("B"))
        file.flush()
        return np.memmap(file, "<f4", mode="c", shape=anchor.shape).view(np.ndarray)


async def publication(
    maker: CheckpointMaker, ready: asyncio.Queue[int], state: StateCopy, folder: Path, running: asyncio.Future[None]
) -> None:
    """Until the round of ``state`` is signed and served; an error ends ``running`` first."""
    maker.offer(replace(state, anchor=await asyncio.to_thread(copied, state.anchor, folder)))
    waiting = asyncio.ensure_future(ready.get())
    await asyncio.wait({waiting, running}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        if running.done():
            running.result()
        raise TimeoutError(f"no checkpoint within {TIMEOUT_S:.0f} s")


def row_of(before: Moment, during: Moment, after: Moment) -> dict[str, float]:
    """What a publication took: ``lost_s`` of training by the steps that were not made, ``cpu_s`` beside those made."""
    quiet_steps, quiet_s = before.steps + after.steps, before.at_s + after.at_s
    quiet_rate, cpu_per_step = quiet_steps / quiet_s, (before.cpu_s + after.cpu_s) / quiet_steps
    return {
        "seconds": during.at_s,
        "quiet_steps_per_s": quiet_rate,
        "steps_per_s": during.steps / during.at_s,
        "lost_s": during.at_s - during.steps / quiet_rate,
        "cpu_s": during.cpu_s - during.steps * cpu_per_step,
    }


def layout_with(num_parameters: int) -> Layout:
    """Matrices of a million values."""
    count = max(1, num_parameters // (ROWS * COLUMNS))
    return Layout.of((f"layers.{index:04}.weight", (ROWS, COLUMNS)) for index in range(count))


async def measure(root: Path, num_parameters: int, publications: int, baseline_s: float) -> dict[str, Any]:
    """One size of a model; the trainer is the same for all."""
    folder = root / str(num_parameters)
    folder.mkdir()
    parts, layout = make_parts(num_values=2), layout_with(num_parameters)
    anchor = np.random.default_rng(0).standard_normal(layout.num_values, np.float32)
    states = (shard_parts_of(layout.views(anchor)),)
    state = StateCopy(round=1, total_tokens=9, states=states, anchor=anchor)
    ready: asyncio.Queue[int] = asyncio.Queue()
    template = Template(
        folder=folder,
        parts=parts,
        layout=layout,
        signed_spec=ORGANIZER.sign(run_spec.CONTEXT, parts.run_id, parts.spec.canonical_bytes()),
        coordinator=StandIn(parts.run_id),
        publishes=True,
        kept=1,
    )
    store = ChunkStore(root / f"chunks-{num_parameters}", 1 << 20)
    maker = CheckpointMaker(template, store, ready.put_nowait)
    running = asyncio.ensure_future(maker.run())
    trainer = build_trainer()
    trainer.start()
    rows: list[dict[str, float]] = []
    try:
        await warm_up(trainer)
        for number in range(1, publications + 1):
            before, began = await quiet(trainer, baseline_s), Moment.now(trainer)
            await publication(maker, ready, replace(state, round=number), folder, running)
            during = began.until(Moment.now(trainer))
            rows.append(row_of(before, during, await quiet(trainer, baseline_s)))
        served(store, folder / f"checkpoint-{publications}")
    finally:
        await trainer.stop(60.0)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    report = verify_folder(folder / f"checkpoint-{publications}", parts.run_id)
    report.require_ok()
    shutil.rmtree(folder)
    return summary(num_parameters, report.provenance.manifest.size_bytes, rows)


def served(store: ChunkStore, folder: Path) -> None:
    """Every chunk asked for at random is there."""
    manifest = manifests.parse((folder / manifests.MANIFEST_FILE).read_bytes())
    chunks = [chunk for file in manifest.files for chunk in file.chunks]
    for chunk in random.Random(0).sample(chunks, min(5, len(chunks))):
        if store.get(bytes.fromhex(chunk)) is None:
            raise RuntimeError("a published chunk is not served")


def summary(num_parameters: int, size_bytes: int, rows: list[dict[str, float]]) -> dict[str, Any]:
    lost_s = statistics.median(row["lost_s"] for row in rows)
    found = {
        "parameters": num_parameters,
        "size_bytes": size_bytes,
        "seconds_to_downloadable": round(statistics.median(row["seconds"] for row in rows), 2),
        "lost_training_s": round(lost_s, 2),
        "processor_s": round(statistics.median(row["cpu_s"] for row in rows), 2),
        "training_cost_percent": round(100 * max(0.0, lost_s) / INTERVAL_S, 4),
        "publications": [{name: round(value, 3) for name, value in row.items()} for row in rows],
    }
    slower = statistics.median(1 - row["steps_per_s"] / row["quiet_steps_per_s"] for row in rows)
    print(
        f"{num_parameters / 1e6:6.0f} M parameters: {found['seconds_to_downloadable']:6.2f} s until it can be had,"
        f" steps {slower:.0%} slower meanwhile: {lost_s:.2f} s lost, {found['training_cost_percent']:.3f} %;"
        f" {found['processor_s']:.2f} s of one core",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 M parameters, once, under 60 s")
    arguments = parser.parse_args()
    sizes, publications, baseline_s = ((10**7,), 1, 3.0) if arguments.quick else ((10**7, 2 * 10**8), 3, 8.0)
    started, load = time.monotonic(), os.getloadavg()[0]
    root = Path(tempfile.mkdtemp(prefix="publish-"))
    try:
        rows = []
        for size in sizes:
            rows.append(asyncio.run(measure(root, size, publications, baseline_s)))
            gc.collect()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    figures: dict[str, Any] = {
        "seconds_to_downloadable": rows[-1]["seconds_to_downloadable"],
        "training_cost_percent": rows[-1]["training_cost_percent"],
        "rows": rows,
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "seconds_of_the_benchmark": round(time.monotonic() - started, 1),
    }
    settings = {
        "trained_parameters": sum(parameter.numel() for parameter in build_model(TRAINED).parameters()),
        "tokens_per_step": LENGTH,
        "training_threads": 1,
        "publication_interval_s": INTERVAL_S,
    }
    print_result("publish", figures, quick=arguments.quick, settings=settings)


if __name__ == "__main__":
    main()
