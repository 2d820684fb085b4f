"""`swarm push` and `swarm sign`: a checkpoint handed on to places and tools that are not ours.

Decides options and what is printed; leaves the work to `peer.checkpoints.hub` and `peer.checkpoints.model_signature`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, Run, parse_run, verified
from swarm.cli.reaching import known_of


def push(
    folder: Folder,
    target: Annotated[str, typer.Argument(metavar="hf://ORG/NAME", help="A model repository of the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private where it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint, or a set that `swarm export` made, after verifying it; HF_TOKEN says who you are."""
    from peer.checkpoints import hub

    repository = hub.parse_target(target)
    pushed = hub.describe_folder(folder, parse_run(run), known_of)
    url = hub.push(folder, pushed, hub.PushOptions(repository=repository, private=private, revision=revision))
    if as_json:
        output.print_json({"folder": str(folder), "repository": repository, "pushed": pushed.summary, "commit": url})
    else:
        print(f"{url}: {pushed.summary}")


def sign(
    folder: Folder,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="P-256 key in PEM; made where there is none.  [default: yours]")
    ] = None,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Sign a checkpoint as OpenSSF's model-signing does, for who verifies with that: DIR/model.sig."""
    from peer.checkpoints import model_signature
    from swarm.files import write_durably
    from swarm.keyfiles import data_home

    verified(folder, parse_run(run))
    path = key if key is not None else data_home() / "model-signing.pem"
    private = model_signature.load_or_create_key(path)
    public = path.with_suffix(".pub")
    write_durably(public, model_signature.public_pem(private))
    signature = model_signature.sign(folder, private)
    if as_json:
        output.print_json({"signature": str(signature), "public_key": str(public)})
        return
    print(f"{signature}; share {public}, and who has both can check:")
    print(f"  model_signing verify key {folder} --signature {signature} --public-key {public}")
