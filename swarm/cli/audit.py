"""`swarm audit`: a checkpoint recomputed from the signed log.

Decides options and what is printed; leaves the work to `peer.checkpoints.audit`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, Run, parse_run, verified

if TYPE_CHECKING:
    from peer.checkpoints.audit import AuditReport


def audit(
    folder: Folder,
    archive: Annotated[
        Path,
        typer.Option("--archive", metavar="DIR", help="A seed peer's folder of the run (HOME/runs/RUN_ID), or a copy."),
    ],
    earlier: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Start from this earlier checkpoint, not from the genesis."),
    ] = None,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Re-apply the run's signed log and compare the result with a checkpoint, bit for bit; offline."""
    from peer.checkpoints import audit as auditing
    from peer.rounds.archive import Archive

    later = verified(folder, parse_run(run)).provenance
    start = None if earlier is None else (earlier, verified(earlier, later.run_id).provenance)
    first = 0 if start is None else start[1].manifest.round
    rounds = max(1, later.manifest.round - first) * later.spec.num_shards
    with output.progress(rounds, "rounds", "auditing") as advance:
        report = auditing.audit(Archive(archive, later.spec), later, start, lambda _round: advance())
    if as_json:
        output.print_json(_values(folder, report))
    elif report.outcome == "equal":
        start_text = "the genesis" if start is None else f"round {first}"
        print(
            f"{folder}: equal, bit for bit, to the signed log re-applied from {start_text} to round {report.to_round}"
        )
    report.require_equal()


def _values(folder: Path, report: AuditReport) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "outcome": report.outcome,
        "from_round": report.from_round,
        "to_round": report.to_round,
        "equal_to": report.equal_to,
        "differs_at": report.differs_at,
        "missing": list(report.missing) if report.missing else None,
        "shard": None if report.outcome == "equal" else report.shard,
        "num_shards": report.num_shards,
    }
