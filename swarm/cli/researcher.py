"""`swarm checkpoints`, `download`, `verify`: what a run made, fetched and checked.

Decides options and what is printed, and brings a network up for as long as a download takes; leaves the work to
`peer.checkpoints.download` and `peer.checkpoints.verify`.
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output

if TYPE_CHECKING:
    from peer.checkpoints.download import OnProgress
    from peer.checkpoints.verify import Report
    from peer.coordinator_client import CoordinatorClient, RunInfo
    from peer.p2p.transport import Transport
    from swarm.invite import Invite
    from swarm.run_spec import RunSpec

_MEGABYTE = 1_000_000
_MAX_ROUND = 2**63 - 1
_STATUS_LIFETIME_S = 600.0  # the longest that the directory keeps a record

InviteText = Annotated[str, typer.Argument(metavar="INVITE", help="The invite that the organizer shared.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, as `swarm download` printed it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Run = Annotated[
    str | None, typer.Option("--run", metavar="INVITE|ID", help="The run that the checkpoint must come from.")
]


def checkpoints(invite: InviteText, as_json: Json = False) -> None:
    """List the checkpoints that a run has published, newest first."""
    from swarm.invite import parse

    listing = asyncio.run(_list(parse(invite)))
    if as_json:
        output.print_json(listing)
        return
    rows = [
        (
            entry["round"],
            f"{entry['total_tokens']:,}",
            f"{entry['size_bytes'] / _MEGABYTE:,.1f} MB",
            "-" if math.isnan(entry["validation_loss"]) else f"{entry['validation_loss']:.4f}",
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry["published_unix_ms"] / 1000)),
            entry["manifest_digest"][:16],
        )
        for entry in listing["checkpoints"]
    ]
    columns = ("round", "tokens", "size", "validation loss", "published (UTC)", "manifest digest")
    output.table(f"{listing['name']}: {len(rows)} checkpoints", columns, rows)


def download(
    invite: Annotated[
        str, typer.Argument(metavar="INVITE[@ROUND]", help="The invite; @ROUND for one round, else the newest.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for checkpoints.  [default: ./RUN]")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take the newest round on offer though DIR holds a newer one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a checkpoint from the run's peers and verify it; run again, it resumes."""
    parsed, round_number = parse_invite_at_round(invite)
    report = asyncio.run(download_checkpoint(parsed, round_number, out, force))
    if as_json:
        output.print_json(report.as_json())
    else:
        print(f"{report.folder}: round {report.provenance.manifest.round}, {_size(report)}, verified")


def verify(folder: Folder, run: Run = None, as_json: Json = False) -> None:
    """Check every byte and signature of a checkpoint, offline; exit code 76 where anything is wrong."""
    run_id = parse_run(run)
    report = _verify(folder, run_id)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        output.print_json(report.as_json())
    elif report.ok:
        _print_report(report, run_id is not None)
    report.require_ok()


def parse_invite_at_round(text: str) -> tuple[Invite, int]:
    """``INVITE`` or ``INVITE@ROUND``: the invite, and the round (0: the newest)."""
    from swarm.errors import ConfigError
    from swarm.invite import parse

    invite, at, round_text = text.strip().partition("@")
    if not at:
        return parse(invite), 0
    if not re.fullmatch(r"[0-9]{1,19}", round_text) or not 1 <= int(round_text) <= _MAX_ROUND:
        raise ConfigError(
            f"{round_text[:40]!r} is no round", "write INVITE@ROUND, with a round that `swarm checkpoints` lists"
        )
    return parse(invite), int(round_text)


def parse_run(text: str | None) -> bytes | None:
    """A run id from ``--run``: an invite, or 40 hexadecimal digits."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9a-fA-F]{40}", text):
        return bytes.fromhex(text)
    from swarm.invite import parse

    return parse(text).run_id


def trusted_folder(run_id: bytes) -> Path:
    """Where this machine keeps what it trusts of a run's metadata."""
    from swarm.keyfiles import data_home

    return data_home() / "trusted" / run_id.hex()


def _known_roots(run_id: bytes, spec: RunSpec) -> tuple[bytes, ...]:
    from peer.checkpoints import trusted

    return trusted.known_roots(trusted_folder(run_id), run_id, spec)


async def _list(invite: Invite) -> dict[str, Any]:
    async with _coordinator(invite) as client:
        run = await client.get_run()
        found = await client.checkpoints()
    entries = [
        {
            "round": info.round,
            "total_tokens": info.total_tokens,
            "size_bytes": info.size_bytes,
            "validation_loss": info.validation_loss,
            "published_unix_ms": info.published_unix_ms,
            "manifest_digest": info.manifest_digest.hex(),
        }
        for info in found
    ]
    return {"name": run.spec.name, "run_id": invite.run_id.hex(), "checkpoints": entries}


async def download_checkpoint(invite: Invite, round_number: int, out: Path | None, force: bool) -> Report:
    """Ask the coordinator for the checkpoint (round 0: the newest), fetch it from peers, and verify it in place."""
    from peer.checkpoints import download as downloads
    from peer.checkpoints import trusted
    from peer.rounds.statuses import StatusRules
    from swarm import manifest

    async with _coordinator(invite) as client:
        run = await client.get_run()
        source = trusted.files_source(await client.metadata())
        known = await asyncio.to_thread(trusted.refresh, trusted_folder(invite.run_id), invite.run_id, run.spec, source)
        publication = await client.checkpoint(round_number or known.newest_round)
        known.check(publication)
    order = downloads.Order(
        run_id=invite.run_id,
        signed_spec=run.signed_spec,
        publication=publication,
        target=out if out is not None else Path(run.spec.name),
        any_round=force or round_number > 0,
    )
    wanted = manifest.parse(publication.manifest.payload)
    rules = StatusRules(
        run_id=invite.run_id,
        publication_key=bytes.fromhex(run.spec.publication_key),
        founders=tuple(run.genesis.voters),
        lifetime_s=_STATUS_LIFETIME_S,
    )
    with output.progress(_megabytes(wanted.size_bytes), "MB", f"round {wanted.round}") as advance:
        async with _network(invite, run) as transport:
            now_unix_s = time.time() + run.clock_offset_s
            holders = await downloads.find_holders(transport, rules, wanted.round, now_unix_s)
            return await downloads.download(transport, order, holders, _cumulative(advance))


@asynccontextmanager
async def _coordinator(invite: Invite) -> AsyncIterator[CoordinatorClient]:
    from peer.coordinator_client import CoordinatorClient

    client = await CoordinatorClient.connect(invite)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def _network(invite: Invite, run: RunInfo) -> AsyncIterator[Transport]:
    """A connection to the run's peers under a key of its own, gone afterwards."""
    from peer.p2p.network import NetworkConfig, open_network
    from peer.rounds.statuses import status_key
    from swarm.identity import Identity

    config = NetworkConfig(
        run_id=invite.run_id,
        clock=lambda: time.time() + run.clock_offset_s,
        directory_keys=tuple(status_key(shard) for shard in range(run.spec.num_shards)),
        initial_peers=run.seed_addresses,
        dht_server=False,
    )
    network = await open_network(config, Identity.generate())
    try:
        yield network
    finally:
        await network.close()


def verified(folder: Path, run_id: bytes | None) -> Report:
    """The report on a folder without a flaw, with progress; raises as `Report.require_ok` and `verify_folder`."""
    report = _verify(folder, run_id)
    report.require_ok()
    return report


def _verify(folder: Path, run_id: bytes | None) -> Report:
    from peer.checkpoints.verify import verify_folder

    with output.progress(_folder_megabytes(folder), "MB", "verifying") as advance:
        return verify_folder(folder, run_id, _in_megabytes(advance), _known_roots)


def _print_report(report: Report, run_was_named: bool) -> None:
    provenance = report.provenance
    manifest = provenance.manifest
    rows = [
        ("run", f"{manifest.run_name} ({provenance.run_id.hex()})"),
        ("organizer's key", provenance.spec.organizer_key),
        ("round", f"{manifest.round}, after {manifest.total_tokens:,} tokens"),
        ("state digest", manifest.state_digest),
        ("witnesses", f"{len(provenance.witnesses)} of {provenance.num_live} replicas signed this state"),
        ("files", f"{len(manifest.files)}, {_size(report)}"),
    ]
    output.table(f"{report.folder}: every byte and signature is right", ("what", "value"), rows)
    if not run_was_named:
        print("Compare the run id with the one that the organizer published, or name it with --run.")


def _folder_megabytes(folder: Path) -> int:
    """About how much there is to read, for the progress bar."""
    try:
        return _megabytes(sum(path.lstat().st_size for path in folder.iterdir()))
    except OSError:
        return 1  # what is wrong with the folder is told when it is verified


def _megabytes(size_bytes: int) -> int:
    return max(1, -(-size_bytes // _MEGABYTE))


def _cumulative(advance: output.Advance) -> OnProgress:
    """Turn (bytes done, bytes in all) into whole megabytes of progress."""
    told = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        now = _megabytes(total) if done >= total else done // _MEGABYTE
        if now > told:
            advance(now - told)
            told = now

    return on_progress


def _in_megabytes(advance: output.Advance) -> Any:
    """Turn bytes read into whole megabytes of progress."""
    waiting = 0

    def on_bytes(count: int) -> None:
        nonlocal waiting
        waiting += count
        if waiting >= _MEGABYTE:
            advance(waiting // _MEGABYTE)
            waiting %= _MEGABYTE

    return on_bytes


def _size(report: Report) -> str:
    return f"{report.provenance.manifest.size_bytes / _MEGABYTE:,.1f} MB"
