"""Swarms that nobody has yet: which models 100 to 10,000 volunteers could train, and what would bound them.

    .venv/bin/python scripts/bench/simulate.py [--quick]

A day of each swarm (`simulate_swarm`), with homes, cards and sessions from published statistics
(`simulate_volunteers`), hops by the program's own code under a clock that jumps (`simulate_hops`), and rounds part by
part (`simulate_rounds`). `simulate_validation` sets the same models to what `pipeline` and `allreduce` measured:
``validation_error_percent`` is the largest difference, in either direction. Full runs draw `docs/images/scale.svg`.

Nothing foreign drives it: hops are coroutines already, so an event loop whose clock jumps is the queue of their events,
and a heap holds who comes and goes. A library of events would want the hops written a second time.

Per swarm: tokens/s and tokens a day that are committed, their share of what all its cards could compute (utilisation),
and the largest loss on the way. Last line: one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import simulate_validation
from report import print_result
from simulate_swarm import LOSSES, Day, day, efficiency, found
from simulate_volunteers import CARDS, HOMES, SESSION_S, SUSTAINED, study

ROOT = Path(__file__).parents[2]
MEASURED, PICTURE = ROOT / "docs" / "benchmarks", ROOT / "docs" / "images" / "scale.svg"
SEED = 0
VOLUNTEERS = (100, 1_000, 10_000)
# Model, shards, simulated seconds of its pipeline: several times a microbatch's way there and back.
CUTS = (("1B", 1, 0.0), ("7B", 8, 900.0), ("13B", 20, 1200.0), ("70B", 80, 3600.0))
QUICK_CUTS = (("1B", 1, 0.0), ("7B", 8, 200.0))
# Volunteers of whom the pipeline is sampled, for each shard where there are many; a larger swarm is so many of each.
SAMPLE, QUICK_SAMPLE, PER_SHARD = 100, 40, 4


def swarms(*, quick: bool) -> list[dict[str, Any]]:
    rows = []
    print(f"{'model':6}{'shards':>7}{'volunteers':>12}{'tokens/s':>12}{'tokens/day':>12}{'used':>8}  bound by")
    for name, num_shards, seconds in QUICK_CUTS if quick else CUTS:
        seen = study(name, num_shards)
        places = found(seen, QUICK_SAMPLE if quick else max(SAMPLE, PER_SHARD * num_shards), SEED)
        waits = efficiency(seen, places, SEED, seconds)
        for number in VOLUNTEERS[:2] if quick else VOLUNTEERS:
            came = day(seen, places, number, waits, SEED)
            rows.append(_row(name, num_shards, number, waits, came))
            row = rows[-1]
            print(
                f"{name:6}{num_shards:7}{number:12,}{row['tokens_per_s']:12,.0f}{row['tokens_per_day']:12.2g}"
                f"{row['utilisation']:8.2%}  {row['bound_by']}",
                flush=True,
            )
    return rows


def _row(name: str, num_shards: int, number: int, waits: float, came: Day) -> dict[str, Any]:
    left = {
        loss: round(after / before, 4) if before else None
        for loss, before, after in zip(LOSSES, came.kept, came.kept[1:], strict=False)
    }
    return {
        "model": name,
        "shards": num_shards,
        "volunteers": number,
        "tokens_per_s": round(came.tokens_per_s, 1),
        "tokens_per_day": round(came.tokens_per_day),
        "utilisation": round(came.utilisation, 5),
        "bound_by": came.bound_by,
        "left_after": left,
        "pipeline_efficiency": round(waits, 4),
        "minutes_to_fetch_the_state": round(came.state_minutes, 1),
        "seconds_of_a_round": round(came.round_s, 1),
        "share_of_time_without_training": round(came.samples_without_training, 3),
    }


def validate(folder: Path) -> dict[str, Any]:
    compared = [*simulate_validation.pipelines(folder), *simulate_validation.rounds(folder)]
    for one in compared:
        print(f"{one.name:58} {one.measured:9,.2f} {one.simulated:9,.2f} {one.unit:9} {one.error_percent:+6.1f} %")
    if not any(one.unit == "tokens/s" for one in compared):
        print("no pipeline.json of a full run: pipelines are not validated")
    errors = [abs(one.error_percent) for one in compared]
    return {
        "validation_error_percent": round(max(errors), 1),
        "mean_validation_error_percent": round(sum(errors) / len(errors), 1),
        "validation": [
            {"name": one.name, "unit": one.unit, "measured": one.measured, "simulated": round(one.simulated, 3)}
            for one in compared
        ],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a day over volunteers, the best cut of each model, with how long 20 tokens a parameter would take."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for name in dict.fromkeys(row["model"] for row in rows):
        best: dict[int, float] = {}
        for row in rows:
            if row["model"] == name:
                best[row["volunteers"]] = max(row["tokens_per_day"], best.get(row["volunteers"], 0.0))
        axes.plot(list(best), list(best.values()), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="volunteers", ylabel="committed tokens a day")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, fewer volunteers, no picture, under 60 s")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # sources that wait say so
    figures = validate(MEASURED)
    print()
    rows = swarms(quick=options.quick)
    if not options.quick:
        draw(rows, PICTURE)
    settings = {
        "session_s": SESSION_S,
        "sustained": SUSTAINED,
        "cards": {card.name: card.share for card in CARDS},
        "homes_mbit": {home.provider: [home.up_bps / 1e6, home.down_bps / 1e6] for home in HOMES},
        "seed": SEED,
    }
    print_result("simulate", figures | {"swarms": rows}, quick=options.quick, settings=settings)


if __name__ == "__main__":
    main()
