"""What 8 bits and local training cost in quality: validation loss after equal tokens on real text.

    .venv/bin/python scripts/bench/quality.py --results FOLDER [--seeds 0 1 2] [--large-seeds 0]
    .venv/bin/python scripts/bench/quality.py --quick

Three arms begin with the same weights and read the same bytes (see `quality_arms`):
    int8    four 8-bit replicas, contributions and averages in the wire codec of a run, a round every few steps
    fp32    the same rounds with fp32 replicas, fp32 moments and an fp32 wire
    sync    one fp32 model; every step the mean gradient of the four batches
``gap_int8_percent`` = (int8 - fp32) / fp32, ``gap_local_percent`` = (int8 - sync) / sync, of the last losses; mean over
seeds, with the standard error of that mean. One thread: start two processes with other seeds for two cores.

Each arm that is done is a file in FOLDER and is not made again: a run may be killed and started again, and the figures
are those of all seeds that FOLDER holds. ``--set NAME=VALUE`` changes the setting, to repeat a trial of
docs/benchmarks.md; a FOLDER holds one setting. Last line: one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from quality_arms import ARMS, num_parameters
from quality_results import Result, load, make, mean_and_error, percent_above
from quality_setting import LARGE, QUICK, REPLICAS, SMALL, VOCAB, Setting, read_text
from report import print_result

# name -> (of which arm the loss, against which)
GAPS = {
    "gap_int8_percent": ("int8", "fp32"),
    "gap_local_percent": ("int8", "sync"),
    "gap_local_fp32_percent": ("fp32", "sync"),
}


def gap(arms: dict[str, Result], name: str) -> float | None:
    """In percent; None where an arm is missing."""
    of, against = GAPS[name]
    if of not in arms or against not in arms:
        return None
    return percent_above(arms[of], arms[against])


def summarise(found: dict[int, dict[str, Result]]) -> dict[str, Any]:
    """Gaps over all seeds, and what each seed did."""
    figures: dict[str, Any] = {}
    for name in GAPS:
        values = [value for arms in found.values() if (value := gap(arms, name)) is not None]
        mean, error = mean_and_error(values)
        figures[name] = None if mean is None else round(mean, 3)
        figures[f"{name}_standard_error"] = None if error is None else round(error, 3)
        figures[f"{name}_by_seed"] = [round(value, 3) for value in values]
    for key in ("loss", "curve", "cpu_s", "commit"):
        figures[key] = {seed: {arm: result[key] for arm, result in arms.items()} for seed, arms in found.items()}
    return figures


def show(size: str, found: dict[int, dict[str, Result]], figures: dict[str, Any]) -> None:
    print(f"{size:12} " + " ".join(f"{arm:>9}" for arm in ARMS) + "".join(f"{name:>24}" for name in GAPS))
    for seed, arms in found.items():
        losses = " ".join(f"{arms[arm]['loss']:9.4f}" if arm in arms else " " * 9 for arm in ARMS)
        gaps = [gap(arms, name) for name in GAPS]
        print(f"{f'seed {seed}':12} {losses}" + "".join(f"{'':24}" if g is None else f"{g:24.2f}" for g in gaps))
    means = []
    for name in GAPS:
        mean, error = figures[name], figures[f"{name}_standard_error"]
        means.append("" if mean is None else f"{mean:.2f}" + ("" if error is None else f" +- {error:.2f}"))
    print(f"{'mean':12} {'':29}" + "".join(f"{text:>24}" for text in means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one seed, under 60 s")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where finished arms are kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--large-seeds", type=int, nargs="*", default=[0], help="seeds of the larger model")
    parser.add_argument("--arms", choices=ARMS, nargs="*", default=list(ARMS))
    parser.add_argument("--set", dest="changes", nargs="*", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    if not options.quick and options.results is None:
        parser.error("name a folder with --results")
    torch.set_num_threads(1)
    sizes = {"1m": (SMALL, options.seeds), "3m": (LARGE, options.large_seeds)}
    if options.quick:
        sizes = {"quick": (QUICK, [0, 1])}
    settings = {size: setting.changed(options.changes) for size, (setting, _) in sizes.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.results or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for size, (_, seeds) in sizes.items():
            for seed in seeds:
                for arm in options.arms:
                    make(folder, size, ARMS[arm], settings[size], seed)
        figures = tell(folder, settings)
    everywhere = {"replicas": REPLICAS, "vocabulary": VOCAB}
    print_result("quality", figures, quick=options.quick, settings=everywhere)


def tell(folder: Path, settings: dict[str, Setting]) -> dict[str, Any]:
    """Print the tables; the figures of the first size as they are, and of all by size."""
    text = read_text()
    plateaus = {name: round(loss, 4) for name, loss in text.plateaus().items()}
    print(f"{text.num_files} files, {len(text.training):,} bytes to train on, {len(text.validation):,} to validate on")
    print("validation loss of frequencies alone: " + ", ".join(f"{name} {loss}" for name, loss in plateaus.items()))
    by_size = {}
    for size, setting in settings.items():
        if found := load(folder, size):
            figures = summarise(found)
            show(size, found, figures)
            by_size[size] = {"parameters": num_parameters(setting), "setting": dataclasses.asdict(setting), **figures}
    first = next(iter(by_size.values()), {})
    headline = {key: value for key, value in first.items() if key.startswith("gap_")}
    return {**headline, "plateaus": plateaus, "sizes": by_size}


if __name__ == "__main__":
    main()
