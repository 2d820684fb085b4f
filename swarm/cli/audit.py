"""`swarm audit`: a checkpoint recomputed from the signed log, which lies in a folder or comes from seed peers.

Decides options, where what is fetched lies, and what is printed; leaves the work to `peer.checkpoints.audit` and
`peer.checkpoints.collecting`.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.download import Json, Wanted, download_checkpoint, invite_of, parse_invite_at_round, parse_run, verified
from swarm.cli.reaching import Where, coordinator, current_publication, known_of, network

if TYPE_CHECKING:
    from peer.checkpoints.audit import AuditReport
    from peer.checkpoints.verify import Provenance
    from peer.rounds.archive import Archive
    from swarm.invite import Invite
    from swarm.manifest import CheckpointManifest


def audit(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="DIR|INVITE[@ROUND]", help="A checkpoint folder; or what a run published."),
    ],
    archive: Annotated[
        Path | None,
        typer.Option("--archive", metavar="DIR", help="A seed peer's folder of the run (HOME/runs/RUN_ID), or a copy."),
    ] = None,
    earlier: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="DIR|ROUND",
            help="Start from this earlier checkpoint, not from the genesis; a round is downloaded.",
        ),
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

    later, invite = _later(checkpoint, run, archive)
    start = None if earlier is None else _start(earlier, later.provenance, invite)
    first, last = 0 if start is None else start[1].manifest.round, later.provenance.manifest.round
    spec = later.provenance.spec
    if archive is not None:
        found = Archive(archive, spec)
    elif invite is not None:
        found = asyncio.run(_collect(invite, last, None if start is None else start[1].manifest))
    with output.progress(max(1, last - first) * spec.num_shards, "rounds", "auditing") as advance:
        report = auditing.audit(found, later.provenance, start, lambda _round: advance())
    if as_json:
        output.print_json({"folder": later.folder} | _values(report))
    elif report.outcome == "equal":
        start_text = "the genesis" if start is None else f"round {first}"
        print(f"{later.name}: equal, bit for bit, to the signed log re-applied from {start_text} to round {last}")
        if later.folder is None:
            print("What was compared is the state that its witnesses signed; for the files: swarm download, verify.")
    report.require_equal()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Later:
    """The audited checkpoint; ``folder``: where its files were read, too."""

    provenance: Provenance
    name: str
    folder: str | None


def _later(checkpoint: str, run: str | None, archive: Path | None) -> tuple[_Later, Invite | None]:
    """What is audited, and the invite of the run where one was given."""
    from swarm.errors import ConfigError
    from swarm.invite import PREFIX

    if not os.path.isdir(checkpoint) and checkpoint.startswith(PREFIX):
        invite, round_number = parse_invite_at_round(checkpoint)
        if run is not None and parse_run(run) != invite.run_id:
            raise ConfigError("--run names another run than the invite", "leave out --run")
        provenance = asyncio.run(_published(invite, round_number))
        name = f"round {provenance.manifest.round} of {provenance.manifest.run_name}"
        return _Later(provenance=provenance, name=name, folder=None), invite
    invite_of_run = invite_of(run)[0]
    if archive is None and invite_of_run is None:
        raise ConfigError(
            "an audit needs the run's log",
            "name a folder that holds it: --archive DIR; or fetch it: --run INVITE",
        )
    provenance = _verified_fp32(Path(checkpoint), parse_run(run))
    return _Later(provenance=provenance, name=checkpoint, folder=checkpoint), invite_of_run


def _verified_fp32(folder: Path, run_id: bytes | None) -> Provenance:
    """Of a folder whose weights are the state that the log makes."""
    from peer.checkpoints.sets import require_fp32

    provenance = verified(folder, run_id).provenance
    require_fp32(folder, provenance.manifest, "an audit")
    return provenance


async def _published(invite: Invite, round_number: int) -> Provenance:
    """Spec, manifest and witnesses of a round (0: the newest), verified; none of its files."""
    from peer.checkpoints.verify import check_provenance

    async with coordinator(invite) as client:
        run, publication = await client.get_run(), await current_publication(client, invite, round_number)
        return check_provenance(run.signed_spec, publication, invite.run_id, known_of)


def _start(earlier: str, later: Provenance, invite: Invite | None) -> tuple[Path, Provenance]:
    """The folder of the earlier checkpoint, verified; a round is downloaded where audits keep what they fetch."""
    from swarm.errors import ConfigError
    from swarm.manifest import FP32

    if os.path.isdir(earlier) or not re.fullmatch(r"[0-9]{1,19}", earlier):
        return Path(earlier), _verified_fp32(Path(earlier), later.run_id)
    if invite is None:
        raise ConfigError(f"round {earlier} must be downloaded to start from it", "name its run: --run INVITE")
    number = int(earlier)
    if not 0 < number < later.manifest.round:
        raise ConfigError(
            f"--from {earlier}: round {later.manifest.round} is audited from an earlier checkpoint",
            "name a round that `swarm checkpoints` lists before it; without --from an audit starts at the genesis",
        )
    target = _audit_folder(later.run_id) / "checkpoints"
    wanted = Wanted(round_number=number, dtype=FP32, out=target, force=False)
    report, _ = asyncio.run(download_checkpoint(invite, wanted, Where()))
    return report.folder, report.provenance


def _audit_folder(run_id: bytes) -> Path:
    """Where this machine keeps what it fetched for audits of a run."""
    from swarm.keyfiles import data_home

    return data_home() / "audits" / run_id.hex()


async def _collect(invite: Invite, last_round: int, start: CheckpointManifest | None) -> Archive:
    """The run's archive, fetched from its seed peers as far as this machine lacks it."""
    from peer.checkpoints.collecting import Sources, collect
    from peer.p2p.reachability import seeds_of

    first_round = 0 if start is None else start.round
    async with coordinator(invite) as client:
        run = await client.get_run()
        async with network(invite, run) as transport:
            sources = Sources(
                transport=transport,
                holders=tuple(dict.fromkeys([*seeds_of(run.seed_addresses), *run.genesis.voters])),
                spec=run.spec,
                genesis=run.genesis,
                signed_genesis=run.signed_genesis,
            )
            num_rounds = max(1, last_round - first_round) * run.spec.num_shards
            with output.progress(num_rounds, "rounds", "fetching the log") as advance:
                return await collect(sources, _audit_folder(invite.run_id), last_round, start, advance)


def _values(report: AuditReport) -> dict[str, Any]:
    return {
        "outcome": report.outcome,
        "from_round": report.from_round,
        "to_round": report.to_round,
        "equal_to": report.equal_to,
        "differs_at": report.differs_at,
        "missing": list(report.missing) if report.missing else None,
        "shard": None if report.outcome == "equal" else report.shard,
        "num_shards": report.num_shards,
    }
