"""`swarm leaderboard`: the checkpoints of one or several runs, compared by what was measured of them.

Decides options and what is printed; leaves the work to `peer.checkpoints.leaderboard`.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli import output
from swarm.cli.download import Json, Mirrors
from swarm.cli.reaching import Away, Where, coordinator_or_mirrors, known_of, of_mirrors, trusted_folder

if TYPE_CHECKING:
    from peer.checkpoints.leaderboard import Row
    from peer.coordinator_client import CoordinatorClient
    from swarm.invite import Invite

_MAX_COLUMNS = 8


def leaderboard(
    sources: Annotated[
        list[str], typer.Argument(metavar="INVITE|DIR...", help="Runs by their invites, checkpoints by their folders.")
    ],
    mirror: Mirrors = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it too: .svg, .png or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Compare checkpoints: validation losses, and evaluations that were told to the run or lie beside a folder."""
    from peer.checkpoints import leaderboard as board

    rows = board.merged([row for source in sources for row in _rows(source, Where(named=tuple(mirror or ())))])
    if plot is not None:
        board.plot(rows, plot)
    metrics = board.metrics_of(rows)
    if as_json:
        drawn = str(plot) if plot is not None else None
        output.print_json({"metrics": metrics, "checkpoints": [row.as_json() for row in rows], "plot": drawn})
        return
    shown = metrics[:_MAX_COLUMNS]
    cells = [
        (
            row.run,
            row.round,
            f"{row.total_tokens:,}" if row.total_tokens is not None else "-",
            *(f"{row.scores[name]:.4f}" if name in row.scores else "-" for name in shown),
        )
        for row in rows
    ]
    output.table("", ("run", "round", "tokens", *shown), cells)
    if len(metrics) > len(shown):
        print(f"and {len(metrics) - len(shown)} more metrics: --json shows them all")
    if plot is not None:
        print(f"drawn: {plot}")


def _rows(source: str, where: Where) -> list[Row]:
    from peer.checkpoints.facts import read_facts
    from peer.checkpoints.leaderboard import row_of_folder
    from swarm.invite import parse

    if os.path.isdir(source):  # Path.is_dir raises where a name is too long, as invites can be
        return [row_of_folder(read_facts(Path(source), None, known_of))]
    return asyncio.run(_rows_of_run(parse(source), where))


async def _rows_of_run(invite: Invite, where: Where) -> list[Row]:
    from peer.checkpoints import leaderboard as board
    from peer.checkpoints.listing import read_listing

    folder = trusted_folder(invite.run_id)
    async with coordinator_or_mirrors(invite, where) as client:
        if not isinstance(client, Away):
            return await _rows_of_coordinator(client, invite)
        listing = await of_mirrors(where, client, lambda mirror: read_listing(mirror, folder, invite.run_id))
    print("warning: mirrors tell only evaluations that later checkpoints' records carry", file=sys.stderr)
    return board.rows_of_listing(listing)


async def _rows_of_coordinator(client: CoordinatorClient, invite: Invite) -> list[Row]:
    from peer.checkpoints.leaderboard import VALIDATION_LOSS, Row, told_evaluations, with_evaluations

    rows, run = [], await client.get_run()
    for info in await client.checkpoints():
        told = await client.evaluations(info.round) if info.num_evaluations else []
        row = Row(
            run=run.spec.name,
            run_id=invite.run_id.hex(),
            round=info.round,
            total_tokens=info.total_tokens,
            scores={} if math.isnan(info.validation_loss) else {VALIDATION_LOSS: info.validation_loss},
        )
        rows.append(with_evaluations(row, told_evaluations(told, invite.run_id, info.manifest_digest)))
    return rows
