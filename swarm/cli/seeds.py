"""`swarm seeds`: which further peers the organizer lets be seed peers of a run.

Leaves the list to `coordinator.seed_list`, and being a seed peer to `swarm seed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PeerIds = Annotated[list[str] | None, typer.Option(metavar="PEER_ID", help="May be repeated.")]


def seeds(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.toml", help="The run file; its state folder lies beside it.")
    ],
    add: PeerIds = None,
    remove: PeerIds = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show, add or remove the peers that may be further seed peers. A running coordinator needs no restart."""
    from coordinator import seed_list
    from swarm.cli import output
    from swarm.cli.organizer import started_spec
    from swarm.identity import peer_id_of

    state = run_file.parent / "state"
    started_spec(state)
    listed = [peer_id_of(key) for key in seed_list.change(state / seed_list.FILE_NAME, add or [], remove or [])]
    if as_json:
        output.print_json({"seed_peers": listed})
        return
    print("\n".join(listed) or "no further seed peers; `swarm start` brings up the first by itself")
