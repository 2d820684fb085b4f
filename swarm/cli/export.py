"""`swarm export`: a checkpoint in another number format, or as a GGUF file.

Decides options, defaults and what is printed; leaves the work to `peer.checkpoints.export_hf` and
`peer.checkpoints.export_gguf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, Run, parse_run, verified
from swarm.cli.reaching import known_of


def export(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", metavar="hf|gguf", help="Hugging Face layout, or a file for llama.cpp.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="What to write.  [default: beside DIR]")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Check the signatures alone.")] = False,
    run: Run = None,
    as_json: Json = False,
) -> None:
    """Derive a set in another format from a verified checkpoint; it names its origin."""
    from peer.checkpoints.export_gguf import export_gguf
    from peer.checkpoints.export_hf import export_hf, refuse_existing
    from peer.checkpoints.facts import read_facts
    from peer.checkpoints.sets import require_fp32
    from peer.checkpoints.weights import Weights
    from swarm.errors import ConfigError
    from swarm.manifest import BF16

    if to not in ("hf", "gguf"):
        raise ConfigError(f"{to!r} is no format to export to", "use --to hf or --to gguf")
    name = f"{folder.resolve().name}-{dtype}" + (".gguf" if to == "gguf" else "")
    target = out if out is not None else folder.resolve().parent / name
    refuse_existing(target)  # before minutes of verifying
    if not no_verify:
        verified(folder, parse_run(run))
    facts = read_facts(folder, parse_run(run), known_of)
    if dtype != BF16:
        require_fp32(folder, facts.provenance.manifest, f"a set in {dtype}")
    work = export_gguf if to == "gguf" else export_hf
    num_tensors = len(Weights(folder, facts.provenance.manifest).shapes)
    with output.progress(num_tensors, "tensors", f"export to {to}") as advance:
        work(facts, target, dtype, lambda: advance(1))
    size = sum(path.stat().st_size for path in target.iterdir()) if target.is_dir() else target.stat().st_size
    if as_json:
        output.print_json({"path": str(target), "to": to, "dtype": dtype, "size_bytes": size})
    else:
        print(f"{target}: {size / 1_000_000:,.1f} MB, {dtype}, from round {facts.card.round}")
