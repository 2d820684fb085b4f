"""`swarm checkpoints`: what a run published, listed."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.download import MEGABYTE, Json
from swarm.cli.reaching import coordinator

if TYPE_CHECKING:
    from swarm.invite import Invite

InviteText = Annotated[str, typer.Argument(metavar="INVITE", help="The invite that the organizer shared.")]


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
            f"{entry['size_bytes'] / MEGABYTE:,.1f} MB",
            "-" if math.isnan(entry["validation_loss"]) else f"{entry['validation_loss']:.4f}",
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry["published_unix_ms"] / 1000)),
            entry["num_evaluations"] or "-",
            entry["manifest_digest"][:16],
        )
        for entry in listing["checkpoints"]
    ]
    columns = ("round", "tokens", "size", "validation loss", "published (UTC)", "evaluations", "manifest digest")
    output.table(f"{listing['name']}: {len(rows)} checkpoints", columns, rows)
    if any(entry["num_evaluations"] for entry in listing["checkpoints"]):
        print("What was measured: swarm leaderboard INVITE")


async def _list(invite: Invite) -> dict[str, Any]:
    async with coordinator(invite) as client:
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
            "num_evaluations": info.num_evaluations,
        }
        for info in found
    ]
    return {"name": run.spec.name, "run_id": invite.run_id.hex(), "checkpoints": entries}
