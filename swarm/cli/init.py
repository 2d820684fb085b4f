"""`swarm init`: writes the run file that an organizer edits.

Decides where it lies and that nothing is overwritten by accident; leaves what it says to `swarm.presets` and
`swarm.run_file`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import output
from swarm.errors import ConfigError


def init(
    name: Annotated[str, typer.Argument(help="What people call the run, and the folder that is made.")],
    preset: Annotated[
        str, typer.Option(help="Sizes to start from: tiny, demo, gpt-125m, llama-1b or mistral-7b.")
    ] = "demo",
    data: Annotated[Path | None, typer.Option(help="Folder made by `swarm data prepare`.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run.toml that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write NAME/run.toml, a commented run file to edit and start."""
    from swarm import presets, run_file
    from swarm.run_spec import parse_section

    folder = Path(name)
    values = presets.preset(preset, "run").model_dump() | {"name": folder.name}
    if data is not None:
        values["data"]["path"] = os.path.relpath(data, folder)
    rules = parse_section(run_file.RunFile, values, "swarm init")
    target = folder / run_file.FILE_NAME
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already", "choose another name, or replace it with --force")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(run_file.render(rules), encoding="utf-8")
    if json:
        output.print_json({"run_file": str(target), "preset": preset, "data": rules.data.path})
    else:
        typer.echo(f"wrote {target} (preset {preset})")
        typer.echo(f"next: swarm data prepare SOURCE --out {folder / rules.data.path}")
        typer.echo(f"then: swarm start {target}")
