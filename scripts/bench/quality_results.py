"""Finished arms of a benchmark of quality: one file each, made once, and what two of them say of each other.

Decides what is kept of an arm, and that a folder holds one setting per name: a run may be killed and started again, and
processes with other seeds share the work. Leaves training to `quality_arms`, figures and tables to the benchmarks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from quality_arms import Arm, train
from quality_setting import Setting, read_text
from report import commit_id

Result = dict[str, Any]


def make(folder: Path, name: str, arm: Arm, setting: Setting, seed: int) -> None:
    """One arm of one seed of the model or rounds called ``name``, unless ``folder`` has it."""
    path = folder / f"{name}-{seed}-{arm.name}.json"
    text = read_text()
    same = {"setting": dataclasses.asdict(setting), "text_sha256": text.digest}
    if path.exists():
        found = json.loads(path.read_text())
        if {key: found[key] for key in same} != same:
            raise SystemExit(f"{path} is of another setting or text; choose another folder")
        return
    started, commit = time.process_time(), commit_id()
    curve = []
    for tokens, loss in train(arm, setting, text, seed):
        curve.append([tokens, round(loss, 5)])
        print(f"  {name} seed {seed} {arm.name:5} {tokens:9,} tokens {loss:.4f}", flush=True)
    result = {
        **{"name": name, "seed": seed, "arm": arm.name, "loss": curve[-1][1], "curve": curve},
        **{"cpu_s": round(time.process_time() - started), "commit": commit, **same},
    }
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(result))
    beside.replace(path)


def load(folder: Path, name: str) -> dict[int, dict[str, Result]]:
    """Seed -> arm -> result, of all arms of ``name`` that are done."""
    found: dict[int, dict[str, Result]] = {}
    for path in sorted(folder.glob(f"{name}-*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["seed"], {})[result["arm"]] = result
    return found


def percent_above(of: Result, against: Result) -> float:
    """How much higher the loss of ``of`` is than that of ``against``."""
    return 100 * float(of["loss"] - against["loss"]) / float(against["loss"])


def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; an error needs two values."""
    if len(values) < 2:
        return (values[0] if values else None), None
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
