"""`swarm checkpoints`: what a run published, listed by its coordinator, or by a mirror where that is away.

Decides what is printed; what a mirror can tell is `peer.checkpoints.listing`'s.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.download import MEGABYTE, Json, Mirrors
from swarm.cli.reaching import Away, Where, coordinator_or_mirrors, of_mirrors, trusted_folder

if TYPE_CHECKING:
    from peer.checkpoints.listing import Listed
    from swarm.invite import Invite
    from swarm.proto.coordinator_pb2 import CheckpointInfo

InviteText = Annotated[str, typer.Argument(metavar="INVITE", help="The invite that the organizer shared.")]


def checkpoints(invite: InviteText, mirror: Mirrors = None, as_json: Json = False) -> None:
    """List the checkpoints that a run has published, newest first."""
    from swarm.invite import parse

    listing = asyncio.run(_list(parse(invite), Where(named=tuple(mirror or ()))))
    if as_json:
        output.print_json(listing)
        return
    rows = [
        (
            entry["round"],
            f"{entry['total_tokens']:,}" if entry["total_tokens"] is not None else "-",
            f"{entry['size_bytes'] / MEGABYTE:,.1f} MB" if entry["size_bytes"] is not None else "-",
            "-" if math.isnan(entry["validation_loss"]) else f"{entry['validation_loss']:.4f}",
            _date(entry["published_unix_ms"]),
            entry["num_evaluations"] or "-",
            entry["manifest_digest"][:16],
        )
        for entry in listing["checkpoints"]
    ]
    columns = ("round", "tokens", "size", "validation loss", "published (UTC)", "evaluations", "manifest digest")
    output.table(f"{listing['name']}: {len(rows)} checkpoints", columns, rows)
    if any(entry["num_evaluations"] for entry in listing["checkpoints"]):
        print("What was measured: swarm leaderboard INVITE")


async def _list(invite: Invite, where: Where) -> dict[str, Any]:
    from peer.checkpoints.listing import read_listing

    folder = trusted_folder(invite.run_id)
    async with coordinator_or_mirrors(invite, where) as client:
        if isinstance(client, Away):
            found = await of_mirrors(where, client, lambda mirror: read_listing(mirror, folder, invite.run_id))
            name = found.spec.name
            entries = [
                _of_mirror(item, len(found.evaluations(item.entry.manifest_digest))) for item in found.checkpoints
            ]
        else:
            name = (await client.get_run()).spec.name
            entries = [_of_coordinator(info) for info in await client.checkpoints()]
    return {"name": name, "run_id": invite.run_id.hex(), "checkpoints": entries}


def _of_coordinator(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "round": info.round,
        "total_tokens": info.total_tokens,
        "size_bytes": info.size_bytes,
        "validation_loss": info.validation_loss,
        "published_unix_ms": info.published_unix_ms,
        "manifest_digest": info.manifest_digest.hex(),
        "num_evaluations": info.num_evaluations,
    }


def _of_mirror(item: Listed, num_evaluations: int) -> dict[str, Any]:
    """None, or no number, for what the mirror does not tell."""
    loss = item.record.validation_loss if item.record is not None else None
    return {
        "round": item.entry.round,
        "total_tokens": item.manifest.total_tokens if item.manifest is not None else None,
        "size_bytes": item.manifest.size_bytes if item.manifest is not None else None,
        "validation_loss": math.nan if loss is None else loss,
        "published_unix_ms": None,
        "manifest_digest": item.entry.manifest_digest.hex(),
        "num_evaluations": num_evaluations,
    }


def _date(unix_ms: int | None) -> str:
    return "-" if unix_ms is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_ms / 1000))
