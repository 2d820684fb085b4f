"""`swarm checkpoints`, `generate`: what a run made, listed and used.

Decides options and what is printed; leaves the work to `peer.checkpoints.generate`, and fetching and checking to
`swarm.cli.download`.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.download import MEGABYTE, Folder, Json, Run, coordinator, parse_run

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
            entry["manifest_digest"][:16],
        )
        for entry in listing["checkpoints"]
    ]
    columns = ("round", "tokens", "size", "validation loss", "published (UTC)", "manifest digest")
    output.table(f"{listing['name']}: {len(rows)} checkpoints", columns, rows)


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check the folder first.")] = False,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Continue a text with the model of a checkpoint, after verifying it."""
    from peer.checkpoints import generate as generation

    options = generation.GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
        run_id=parse_run(run),
        verify=not no_verify,
    )
    pieces = generation.generate(folder, prompt, options)
    if as_json:
        output.print_json({"folder": str(folder), "prompt": prompt, "seed": seed, "text": "".join(pieces)})
        return
    for piece in pieces:
        sys.stdout.write(_harmless(piece) if output.is_terminal() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


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
        }
        for info in found
    ]
    return {"name": run.spec.name, "run_id": invite.run_id.hex(), "checkpoints": entries}


def _harmless(text: str) -> str:
    """What a model wrote, without characters that would command the terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)
