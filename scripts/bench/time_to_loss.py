"""Wall time to a fixed validation loss on home lines: this system, hivemind.Optimizer, DistributedDataParallel.

    .venv/bin/python scripts/bench/time_to_loss.py [--quick]        needs root: network namespaces

Four peers with 20 Mbit/s up, 100 down and 20 ms between them, one thread each; model, text and the loss are in
`loss_task`. Our side runs for real, by the public commands (`loss_ours`). The rivals are synchronous, so their times
are steps-to-loss in one process times measured seconds per step on the links (`loss_rivals`): ``"extrapolated": true``,
each with the accumulation that is best for it. Start-up counts for nobody.

    speedup_over_hivemind, speedup_over_ddp    the rival's seconds over ours
    inner_step_fraction                        tokens/s of a peer with rounds over those without any
    inner_step_fraction_with_idle_cores        the same where peers train a fifth of the time (`swarm join --duty 20`)

All peers share this machine's cores, so compute costs more here than on machines of their own, on every side; of the
rivals' time it is a smaller share. Last line: one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import dataclasses
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from averaging_place import Place
from demo_run import copy_sources
from demo_stage import DemoFailed, Stage
from loss_ours import Options, race, speed
from loss_rivals import RIVALS, seconds_per_step, steps_to_loss
from loss_task import FULL, QUICK, Task, Text
from report import print_result

from peer.training.model import build_config, build_model, layout_of
from scripts.netlab.lab import Lab, Link, why_not

HOME = Link(up_bps=20e6, down_bps=100e6, delay_s=0.01)
ORGANIZER = Link(up_bps=100e6, down_bps=100e6, delay_s=0.01)
TIMEOUT_S, GRACE_S = 300.0, 30.0
BYTES_PER_VALUE = {"hivemind": 2, "ddp": 4}
# A step that sent less than this share of its gradients did not average them: hivemind goes on alone where it finds no
# group in time, as it does where steps are shorter than its search. Such a setting has no time to the loss.
AVERAGED = 0.9
# Peers that train a fifth of the time leave more than half of two cores idle, as each has on a machine of its own.
PACES = {
    "alone": Options(has_rounds=False),
    "resting_with_rounds": Options(has_rounds=True, duty_percent=20),
    "resting_alone": Options(has_rounds=False, duty_percent=20),
}


def measure(rival: str, accumulation: int, lab: Lab, task: Task, data: Path, folder: Path) -> dict[str, Any]:
    """Seconds per step on the links and megabytes that a peer sends in one, or why there are none."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for peer in range(task.peers):
        place = Place(
            index=peer,
            peers=task.peers,
            namespace=lab.namespace(peer),
            address=lab.address(peer),
            device="eth0",
            folder=folder / f"{rival}-{accumulation}" / str(peer),
            timeout_s=TIMEOUT_S,
        )
        mine, theirs = context.Pipe()
        process = context.Process(target=RIVALS[rival], args=(theirs, place, task, data))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        if rival == "ddp":
            ask(pipes, "begin", lab.address(0))
        else:
            ask(pipes[1:], "begin", ask(pipes[:1], "begin", "")[0]["meet"])
        before = ask(pipes, "usage")
        answers = ask(pipes, "steps", accumulation)
        sent = [b["sent_bytes"] - a["sent_bytes"] for a, b in zip(before, ask(pipes, "usage"), strict=True)]
    except (RuntimeError, OSError, EOFError) as error:
        return {"seconds": None, "sent_mb": None, "failure": str(error)}
    finally:
        close(pipes, processes)
    steps = 1 + min(len(answer["seconds"]) for answer in answers)  # the first has none before it to be timed from
    return {"seconds": seconds_per_step(answers), "sent_mb": round(max(sent) / steps / 1e6, 3)}


def close(pipes: list[Any], processes: list[Any]) -> None:
    """Ask peers to end, and insist."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send(("stop",))
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def ask(pipes: list[Any], *command: Any) -> list[dict[str, Any]]:
    """Every peer's answer to a command that all get at once. Raises `RuntimeError` for the first that failed."""
    for pipe in pipes:
        pipe.send(command)
    deadline = time.monotonic() + TIMEOUT_S + GRACE_S
    answers = []
    for pipe in pipes:
        if not pipe.poll(max(0.1, deadline - time.monotonic())):
            raise RuntimeError(f"no answer to {command[0]}")
        answers.append(pipe.recv())
    failed = [answer for answer in answers if "error" in answer]
    if failed:
        raise RuntimeError(f"{command[0]}: {failed[0]['error']}\n{failed[0]['trace']}")
    return answers


def rivals(lab: Lab, task: Task, data: Path, folder: Path) -> dict[str, Any]:
    """Each rival's figures by accumulation, and its best time."""
    spec, text = task.spec(data), Text(data, folder / "cache", task.length)
    num_values = layout_of(build_model(build_config(spec, task.vocab_size), 0)).num_values
    steps = {k: steps_to_loss(task, spec, text, k, tokens) for k, tokens in task.accumulations}
    print(f"synchronous steps to a loss of {task.target_loss}: {steps}", flush=True)
    found: dict[str, Any] = {"steps_to_loss": steps}
    for rival in RIVALS:
        per_step = {k: measure(rival, k, lab, task, data, folder) for k, _ in task.accumulations}
        least_mb = AVERAGED * 2 * (task.peers - 1) / task.peers * BYTES_PER_VALUE[rival] * num_values / 1e6
        times = {
            k: seconds * count
            for k, count in steps.items()
            if count is not None and (seconds := per_step[k]["seconds"]) and (per_step[k]["sent_mb"] or 0) >= least_mb
        }
        best = min(times.values(), default=None)
        found[rival] = {"per_step": per_step, "seconds_to_loss": best, "by_accumulation": times}
        print(f"{rival:9} {per_step}, seconds to the loss {times}", flush=True)
    return {**found, "extrapolated": True}


def compare(task: Task, folder: Path) -> dict[str, Any]:
    """All sides, one after the other, on the same links."""
    with Lab([HOME] * task.peers + [ORGANIZER]) as lab, Stage(folder) as stage:
        for path in copy_sources(Path(os.__file__).parent, folder / "text")[task.max_files :]:
            path.unlink()
        prepare = ("data", "prepare", "text", "--out", "data", "--vocab-size", str(task.vocab_size))
        stage.swarm(*prepare, "--licence", "PSF-2.0", "--validation-fraction", "0.05")
        found = rivals(lab, task, folder / "data", folder / "rivals")
        ours = race(stage, lab, task)
        print(f"ours      {ours}", flush=True)
        speeds = {
            name: round(speed(stage, lab, task, name.replace("_", "-"), options), 1) for name, options in PACES.items()
        }
        print(f"tokens/s of a peer {speeds}", flush=True)
    return {**keys_of(ours, found, speeds), "ours": {**ours, "tokens_per_s_of": speeds}, "rivals": found}


def keys_of(ours: dict[str, Any], found: dict[str, Any], speeds: dict[str, float]) -> dict[str, Any]:
    """The figures of the goals; None where a side missed the loss."""
    mine = ours["seconds_to_loss"]
    speedups = {
        f"speedup_over_{rival}": None if None in (mine, theirs) else round(theirs / mine, 3)
        for rival in RIVALS
        for theirs in (found[rival]["seconds_to_loss"],)
    }
    return {
        **speedups,
        "inner_step_fraction": round(ours["tokens_per_s"] / speeds["alone"], 4),
        "inner_step_fraction_with_idle_cores": round(speeds["resting_with_rounds"] / speeds["resting_alone"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two peers and a few steps")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"time_to_loss: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # laboratory and programs are taken down
    torch.set_num_threads(1)
    task = QUICK if options.quick else FULL
    folder = Path(tempfile.mkdtemp(prefix="time-to-loss-"))
    try:
        figures = compare(task, folder)
    except DemoFailed as failure:
        sys.exit(f"time_to_loss: {failure}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    links = {"up_bps": HOME.up_bps, "down_bps": HOME.down_bps, "delay_s": 2 * HOME.delay_s}
    print_result("time_to_loss", figures, quick=options.quick, settings={**dataclasses.asdict(task), **links})


if __name__ == "__main__":
    main()
