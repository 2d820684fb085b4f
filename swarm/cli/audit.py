"""`swarm audit`: a checkpoint recomputed from the signed log, which lies in a folder or comes from seed peers.

Decides options, where what is fetched lies, and what is printed; leaves the work to `peer.checkpoints.audit` and
`peer.checkpoints.collecting`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, invite_of, parse_run, verified
from swarm.cli.reaching import coordinator, network

if TYPE_CHECKING:
    from peer.checkpoints.audit import AuditReport
    from peer.rounds.archive import Archive
    from swarm.invite import Invite


def audit(
    folder: Folder,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", metavar="DIR", help="A seed peer's folder of the run (HOME/runs/RUN_ID), or a copy."),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Start from this earlier checkpoint, not from the genesis."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="INVITE|ID",
            help="Its run; by invite and without --archive: fetch the log from seed peers.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Re-apply the run's signed log and compare the result with a checkpoint, bit for bit."""
    from peer.checkpoints import audit as auditing
    from peer.rounds.archive import Archive
    from swarm.errors import ConfigError

    invite = invite_of(run)[0]
    if archive is None and (invite is None or earlier is not None):
        raise ConfigError(
            "an audit needs the run's log"
            + (": what is fetched starts at the genesis, without the momentum after --from" if invite else ""),
            "name a folder that holds it: --archive DIR; or fetch it, without --from: --run INVITE",
        )
    later = verified(folder, parse_run(run)).provenance
    start = None if earlier is None else (earlier, verified(earlier, later.run_id).provenance)
    first, last = 0 if start is None else start[1].manifest.round, later.manifest.round
    if archive is not None:
        found = Archive(archive, later.spec)
    elif invite is not None:
        found = asyncio.run(_collect(invite, _audit_folder(later.run_id), last))
    with output.progress(max(1, last - first) * later.spec.num_shards, "rounds", "auditing") as advance:
        report = auditing.audit(found, later, start, lambda _round: advance())
    if as_json:
        output.print_json(_values(folder, report))
    elif report.outcome == "equal":
        start_text = "the genesis" if start is None else f"round {first}"
        print(
            f"{folder}: equal, bit for bit, to the signed log re-applied from {start_text} to round {report.to_round}"
        )
    report.require_equal()


def _audit_folder(run_id: bytes) -> Path:
    """Where this machine keeps what it fetched for audits of a run."""
    from swarm.keyfiles import data_home

    return data_home() / "audits" / run_id.hex()


async def _collect(invite: Invite, folder: Path, last_round: int) -> Archive:
    """The run's archive, fetched from its seed peers as far as ``folder`` lacks it."""
    from peer.checkpoints.collecting import Sources, collect

    async with coordinator(invite) as client:
        run = await client.get_run()
        async with network(invite, run) as transport:
            sources = Sources(
                transport=transport,
                holders=tuple(run.genesis.voters),
                spec=run.spec,
                genesis=run.genesis,
                signed_genesis=run.signed_genesis,
            )
            with output.progress(last_round * run.spec.num_shards, "rounds", "fetching the log") as advance:
                return await collect(sources, folder, last_round, advance)


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
