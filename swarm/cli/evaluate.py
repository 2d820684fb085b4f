"""`swarm eval`: measure a checkpoint, keep the signed results beside it, and tell the run.

Decides options, what is printed, and that results are told where an invite says to whom; leaves the work to
`peer.checkpoints.harness` and `peer.checkpoints.evaluations`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, invite_of, parse_run, verified
from swarm.cli.reaching import coordinator, known_of

if TYPE_CHECKING:
    from swarm.errors import SwarmError
    from swarm.evaluation import Evaluation
    from swarm.invite import Invite
    from swarm.proto.common_pb2 import Signed


def evaluate(
    folder: Folder,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, task files, or leaderboard, glue, superglue, bias; with commas. "
            "Without: what was measured before is told to the run.",
        ),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question; else the task's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task at most, to try something out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests that the model computes at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything that the harness draws.")] = 1234,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    home: Annotated[Path | None, typer.Option(help="Folder of the key that signs the results.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Check the signatures alone.")] = False,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="INVITE|ID", help="The run that it must come from; by invite: tell it, too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint with lm-evaluation-harness; signed results lie in DIR/evaluations, and go to the run."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: progress is ours
    from peer.checkpoints import evaluations, harness
    from peer.checkpoints.verify import read_provenance
    from peer.home import Home
    from swarm.keyfiles import data_home, load_or_create

    invite, run_id = invite_of(run)[0], parse_run(run)
    if tasks is None and invite is not None:
        _tell_recorded(folder, invite, as_json)
        return
    options = harness.EvalOptions(
        tasks=tuple(name.strip() for item in tasks or () for name in item.split(",") if name.strip()),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    harness.plan_tasks(options.tasks)  # a file that is none is told before the weights are read
    if not no_verify:
        verified(folder, run_id)
    provenance = read_provenance(folder, run_id, known_of)
    made = harness.evaluate(folder, provenance, options, output.progress)
    path, signed = evaluations.record(folder, made, load_or_create(Home((home or data_home()).absolute()).key_path))
    failure = _try_to_tell(invite, signed)
    if as_json:
        told = invite is not None and failure is None
        values = {"path": str(path), "signer": signed.signer.hex(), "told": told, **made.model_dump(mode="json")}
        output.print_json(values)
    else:
        _print(folder, made)
        print(f"signed and recorded: {path}")
        print(_what_became(folder, invite, failure))
    if failure is not None:
        raise failure


def _print(folder: Path, made: Evaluation) -> None:
    rows = [
        (
            result.task,
            made.metric(result),
            f"{result.value:.4f}",
            "-" if result.stderr is None else f"{result.stderr:.4f}",
            result.num_fewshot,
            result.num_samples,
        )
        for result in made.results
    ]
    output.table(f"{folder}: round {made.round}", ("task", "metric", "value", "stderr", "few-shot", "samples"), rows)


def _what_became(folder: Path, invite: Invite | None, failure: SwarmError | None) -> str:
    if failure is not None:
        return f"not told to the run; try that alone again: swarm eval {folder} --run INVITE"
    return "told to the run" if invite is not None else f"to tell the run, too: swarm eval {folder} --run INVITE"


def _try_to_tell(invite: Invite | None, signed: Signed) -> SwarmError | None:
    """Hours of measuring are not lost to a coordinator that is away: what went wrong comes back, to be told last."""
    from swarm.errors import SwarmError

    try:
        if invite is not None:
            asyncio.run(_tell(invite, [signed]))
    except SwarmError as error:
        return error
    return None


def _tell_recorded(folder: Path, invite: Invite, as_json: bool) -> None:
    from peer.checkpoints import evaluations
    from peer.checkpoints.verify import read_provenance
    from swarm.errors import NotFound

    found = evaluations.recorded(folder, read_provenance(folder, invite.run_id, known_of))
    if not found:
        raise NotFound(f"nothing was measured in {folder}", "measure something: swarm eval DIR --tasks ...")
    asyncio.run(_tell(invite, found))
    if as_json:
        output.print_json({"told": len(found)})
    else:
        print(f"told to the run: {len(found)} evaluations")


async def _tell(invite: Invite, found: Sequence[Signed]) -> None:
    async with coordinator(invite) as client:
        for signed in found:
            await client.tell_evaluation(signed)
