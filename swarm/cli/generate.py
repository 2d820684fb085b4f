"""`swarm generate`: text from a checkpoint, as it comes.

Decides options and what is printed; leaves the work to `peer.checkpoints.generate`.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, Run, parse_run, verified


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Draw among this many likeliest tokens; 0: all.")] = 0,
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
        top_k=top_k,
        seed=seed,
        device=device,
        verify=False,
    )
    run_id = parse_run(run)
    text = sys.stdin.read(generation.MAX_PROMPT_CHARACTERS) if prompt == "-" else prompt
    if not no_verify:
        verified(folder, run_id)
    pieces = generation.generate(folder, text, options)
    if as_json:
        output.print_json({"folder": str(folder), "prompt": text, "seed": seed, "text": "".join(pieces)})
        return
    for piece in pieces:
        sys.stdout.write(_harmless(piece) if output.is_terminal() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _harmless(text: str) -> str:
    """What a model wrote, without characters that would command the terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)
