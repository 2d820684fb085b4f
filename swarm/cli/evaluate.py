"""`swarm eval` and `swarm leaderboard`: measure a checkpoint, and compare what was measured.

Decides options and what is printed; leaves the work to `peer.checkpoints.harness` and `peer.checkpoints.leaderboard`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, Run, known_roots, parse_run, verified


def evaluate(
    folder: Folder,
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, task files, or leaderboard, glue, superglue, bias; with commas.",
        ),
    ],
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question; else the task's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task at most, to try something out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests that the model computes at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything that the harness draws.")] = 1234,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    home: Annotated[Path | None, typer.Option(help="Folder of the key that signs the results.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Check the signatures alone.")] = False,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint with lm-evaluation-harness; the signed results lie in DIR/evaluations."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: progress is ours
    from peer.checkpoints import evaluations, harness
    from peer.checkpoints.verify import read_provenance
    from peer.home import Home
    from swarm.keyfiles import data_home, load_or_create

    options = harness.EvalOptions(
        tasks=tuple(name.strip() for item in tasks for name in item.split(",") if name.strip()),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    harness.plan_tasks(options.tasks)  # a file that is none is told before the weights are read
    if not no_verify:
        verified(folder, parse_run(run))
    provenance = read_provenance(folder, parse_run(run), known_roots)
    made = harness.evaluate(folder, provenance, options, output.progress)
    path, signed = evaluations.record(folder, made, load_or_create(Home((home or data_home()).absolute()).key_path))
    if as_json:
        output.print_json({"path": str(path), "signer": signed.signer.hex(), **made.model_dump(mode="json")})
        return
    rows = [
        (
            result.task,
            result.metric,
            f"{result.value:.4f}",
            "-" if result.stderr is None else f"{result.stderr:.4f}",
            result.num_fewshot,
            result.num_samples,
        )
        for result in made.results
    ]
    output.table(f"{folder}: round {made.round}", ("task", "metric", "value", "stderr", "few-shot", "samples"), rows)
    print(f"signed and recorded: {path}")
