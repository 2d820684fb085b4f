"""`swarm download`, `verify`: a checkpoint fetched, and checked.

Decides options and what is printed; leaves the work to `peer.checkpoints.download` and `peer.checkpoints.verify`, and
whom to ask to `swarm.cli.reaching`.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.reaching import Where, coordinator_or_mirrors, known_of, offered, sources_of

if TYPE_CHECKING:
    from peer.checkpoints.filling import Fetching
    from peer.checkpoints.sources import OnProgress, Source, Tally
    from peer.checkpoints.verify import Report
    from swarm.invite import Invite

MEGABYTE = 1_000_000
_MAX_ROUND = 2**63 - 1
_BF16_SETS = {
    "recomputed": "recomputed from these weights: as the manifest lists it",
    "listed": "as the publication key signed it; witnesses signed the fp32 set, of which it was not recomputed here",
}
_RUN_ID = re.compile(r"[0-9a-fA-F]{40}")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, as `swarm download` printed it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Run = Annotated[
    str | None, typer.Option("--run", metavar="INVITE|ID", help="The run that the checkpoint must come from.")
]
Mirrors = Annotated[
    list[str] | None, typer.Option("--mirror", metavar="URL", help="A mirror to fetch from too; may be repeated.")
]
MaxRate = Annotated[float | None, typer.Option("--max-rate", min=0.01, help="Fetch at most so fast, Mbit/s.")]


def download(
    invite: Annotated[
        str, typer.Argument(metavar="INVITE[@ROUND]", help="The invite; @ROUND for one round, else the newest.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for checkpoints.  [default: ./RUN]")
    ] = None,
    mirror: Mirrors = None,
    max_rate: MaxRate = None,
    dtype: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="The weights as they are, or rounded to half of the bytes.")
    ] = "fp32",
    force: Annotated[
        bool, typer.Option("--force", help="Take the newest round on offer though DIR holds a newer one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a checkpoint from peers, mirrors and the coordinator at once and verify it; run again, it resumes."""
    parsed, round_number = parse_invite_at_round(invite)
    where = Where(named=tuple(mirror or ()), max_bytes_per_s=_bytes_per_s(max_rate))
    wanted = Wanted(round_number=round_number, dtype=_set_of(dtype), out=out, force=force)
    report, tally = asyncio.run(download_checkpoint(parsed, wanted, where))
    if as_json:
        output.print_json(report.as_json() | tally.as_json())
    else:
        number = report.provenance.manifest.round
        print(f"{report.folder}: round {number}, {report.files.dtype}, {_size(report)}, verified")
        print(_told(tally) or "everything was here already")
        _warn_of_listed(report)


def verify(
    folder: Folder,
    run: Run = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch what is bad, and only that, from --run's peers or --mirror.")
    ] = False,
    mirror: Mirrors = None,
    max_rate: MaxRate = None,
    as_json: Json = False,
) -> None:
    """Check every byte and signature of a checkpoint, offline; exit code 76 where anything is wrong."""
    from peer.checkpoints.facts import read_evaluations
    from peer.checkpoints.sources import Tally

    run_id, tally = parse_run(run), Tally()
    if repair:
        where = Where(named=tuple(mirror or ()), max_bytes_per_s=_bytes_per_s(max_rate))
        report = asyncio.run(repair_checkpoint(folder, run, where, tally))
    else:
        report = _verify(folder, run_id)
    report = replace(report, bad_evaluations=read_evaluations(folder, report.provenance)[1])
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        output.print_json(report.as_json() | (tally.as_json() if repair else {}))
    elif report.ok:
        _print_report(report, run_id is not None)
        if repair:
            print(_told(tally) or "nothing had to be repaired")
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
    """A run id from ``--run``: an invite (a round may follow), or 40 hexadecimal digits."""
    if text is None:
        return None
    if _RUN_ID.fullmatch(text):
        return bytes.fromhex(text)
    return parse_invite_at_round(text)[0].run_id


def verified(folder: Path, run_id: bytes | None) -> Report:
    """The report on a folder without a flaw, with progress; raises as `Report.require_ok` and `verify_folder`."""
    report = _verify(folder, run_id)
    report.require_ok()
    _warn_of_listed(report)
    return report


def _warn_of_listed(report: Report) -> None:
    """Beside what is printed, so that JSON and generated text stay what they are."""
    if report.bf16_set == "listed":
        print(f"bf16 set: {_BF16_SETS['listed']}", file=sys.stderr)


def _verify(folder: Path, run_id: bytes | None) -> Report:
    from peer.checkpoints.verify import verify_folder

    with output.progress(_folder_megabytes(folder), "MB", "verifying") as advance:
        return verify_folder(folder, run_id, _in_megabytes(advance), known_of)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """``round_number`` 0: the newest; ``out`` None: a folder named as the run."""

    round_number: int
    dtype: str
    out: Path | None
    force: bool


def _set_of(dtype: str) -> str:
    from swarm.errors import ConfigError
    from swarm.manifest import BF16, FP32

    if dtype not in (FP32, BF16):
        raise ConfigError(f"{dtype!r} is no set of a checkpoint", f"use --dtype {FP32} or --dtype {BF16}")
    return dtype


async def download_checkpoint(invite: Invite, order: Wanted, where: Where) -> tuple[Report, Tally]:
    """Fetch one set of a checkpoint, and verify it in place."""
    from peer.checkpoints import download as downloads
    from peer.checkpoints.sources import Tally
    from swarm import manifest

    async with offered(invite, order.round_number, where) as (offer, found):
        placed = downloads.Order(
            run_id=invite.run_id,
            signed_spec=offer.signed_spec,
            publication=offer.publication,
            target=order.out if order.out is not None else Path(offer.spec.name),
            dtype=order.dtype,
            any_round=order.force or order.round_number > 0,
            known_of=known_of,
        )
        wanted = manifest.parse(offer.publication.manifest.payload)
        tally = Tally()
        size_bytes = wanted.file_set(order.dtype).size_bytes
        with output.progress(_megabytes(size_bytes), "MB", f"round {wanted.round}") as advance:
            tally.on_progress = _cumulative(advance, tally)
            return await downloads.download(placed, _fetching(found, tally, where)), tally


async def repair_checkpoint(folder: Path, run: str | None, where: Where, tally: Tally) -> Report:
    """Make the checkpoint in ``folder`` whole again from the run behind an invite, from mirrors, or from both."""
    from peer.checkpoints import mirrors
    from peer.checkpoints.repair import repair, round_in
    from peer.checkpoints.verify import check_provenance, read_provenance
    from swarm.errors import ConfigError, SwarmError

    invite, round_number = invite_of(run)
    if invite is None and not where.named:
        raise ConfigError(
            "to repair, swarm verify must be told where to fetch from",
            "add --run INVITE (the run's peers), or --mirror URL",
        )
    round_number = round_number or round_in(folder)
    async with AsyncExitStack() as stack:
        advance = stack.enter_context(output.progress(_folder_megabytes(folder), "MB", "repairing"))
        tally.on_progress = _cumulative(advance, tally)
        if invite is None:
            provenance = read_provenance(folder, parse_run(run), known_of)
            opening = mirrors.open_mirrors(where.named, (), provenance.manifest.round)
            found: list[Source] = list(await stack.enter_async_context(opening))
        else:
            try:
                provenance = read_provenance(folder, invite.run_id, known_of)
            except SwarmError:
                if round_number == 0:
                    raise
                _refuse_other_run(folder, invite.run_id)
                offer, found = await stack.enter_async_context(offered(invite, round_number, where))
                provenance = check_provenance(offer.signed_spec, offer.publication, invite.run_id, known_of)
            else:
                client = await stack.enter_async_context(coordinator_or_mirrors(invite, where))
                number = provenance.manifest.round
                found = await stack.enter_async_context(sources_of(client, invite, number, where))
        return await repair(folder, provenance, _fetching(found, tally, where))


def _refuse_other_run(folder: Path, run_id: bytes) -> None:
    """Raise `ConfigError` where ``folder`` holds a checkpoint of another run: it is not damaged, but something else."""
    from peer.checkpoints.verify import read_provenance
    from swarm.errors import ConfigError, SwarmError

    try:
        found = read_provenance(folder, None)
    except SwarmError:
        return
    if found.run_id != run_id:
        raise ConfigError(
            f"{folder} holds a checkpoint of another run ({found.manifest.run_name}, {found.run_id.hex()})",
            "name that run with --run; nothing was changed",
        )


def invite_of(run: str | None) -> tuple[Invite | None, int]:
    """The invite in ``--run``, and the round that may follow it; None for a bare run id."""
    if run is None or _RUN_ID.fullmatch(run):
        return None, 0
    return parse_invite_at_round(run)


def _fetching(found: Sequence[Source], tally: Tally, where: Where) -> Fetching:
    from peer.checkpoints.filling import Fetching

    return Fetching(sources=found, tally=tally, max_bytes_per_s=where.max_bytes_per_s)


def _print_report(report: Report, run_was_named: bool) -> None:
    provenance = report.provenance
    manifest = provenance.manifest
    rows = [
        ("run", f"{manifest.run_name} ({provenance.run_id.hex()})"),
        ("organizer's key", provenance.spec.organizer_key),
        ("round", f"{manifest.round}, after {manifest.total_tokens:,} tokens"),
        ("state digest", manifest.state_digest),
        ("witnesses", f"{len(provenance.witnesses)} of {provenance.num_live} replicas signed this state"),
        ("files", f"{len(report.files.files)}, {report.files.dtype}, {_size(report)}"),
        *([("bf16 set", _BF16_SETS[report.bf16_set])] if report.bf16_set is not None else ()),
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
    return max(1, -(-size_bytes // MEGABYTE))


def _cumulative(advance: output.Advance, tally: Tally) -> OnProgress:
    """Turn (bytes done, bytes in all) into whole megabytes of progress, with where they came from."""
    told = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        now = _megabytes(total) if done >= total else done // MEGABYTE
        if now > told:
            advance(now - told, note=_told(tally))
            told = now

    return on_progress


def _told(tally: Tally) -> str:
    """Where the bytes came from, for people."""
    parts = {**tally.by_kind(), "this disk": tally.copied_bytes}
    return ", ".join(f"{name} {count / MEGABYTE:,.1f} MB" for name, count in parts.items() if count)


def _bytes_per_s(max_rate_mbit: float | None) -> float | None:
    return None if max_rate_mbit is None else max_rate_mbit * 1e6 / 8


def _in_megabytes(advance: output.Advance) -> Any:
    """Turn bytes read into whole megabytes of progress."""
    waiting = 0

    def on_bytes(count: int) -> None:
        nonlocal waiting
        waiting += count
        if waiting >= MEGABYTE:
            advance(waiting // MEGABYTE)
            waiting %= MEGABYTE

    return on_bytes


def _size(report: Report) -> str:
    return f"{report.files.size_bytes / MEGABYTE:,.1f} MB"
