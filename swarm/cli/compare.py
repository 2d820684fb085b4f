"""`swarm diff` and `swarm lineage`: what changed between two checkpoints, and where one comes from.

Decides options and what is printed; leaves the work to `peer.checkpoints.compare` and `peer.checkpoints.facts`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.cli import output
from swarm.cli.download import Folder, Json, Run, parse_run, verified
from swarm.cli.reaching import known_of


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The earlier checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The later one.")],
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Check the signatures alone.")] = False,
    as_json: Json = False,
) -> None:
    """Show what changed between two checkpoints: rounds, tokens, data, and how far each layer moved."""
    from peer.checkpoints.compare import compare
    from peer.checkpoints.facts import read_facts

    if not no_verify:
        verified(a, None)
        verified(b, None)
    facts_a, facts_b = read_facts(a, None, known_of), read_facts(b, None, known_of)
    difference = compare(facts_a, facts_b).as_json()
    if as_json:
        output.print_json(difference)
        return
    rows = [(key, difference["a"][key], difference["b"][key]) for key in difference["a"]]
    output.table("", ("what", "A", "B"), rows)
    if difference["starts_from_a"]:
        ago = f"{difference['b']['round']:,} rounds, {difference['b']['total_tokens']:,} tokens ago"
        print(f"B's run started from A: {ago}")
    else:
        print(f"{difference['rounds']:,} rounds and {difference['tokens']:,} tokens apart")
    print("the same data" if difference["same_data"] else "other data")
    if not difference["same_run"]:
        print(f"two runs; rules that differ: {', '.join(difference['rules_changed'])}")
    layers = [
        (
            layer["layer"],
            f"{layer['num_values']:,}",
            *(f"{layer[key]:.4g}" for key in ("norm_a", "norm_b", "moved")),
            "-" if math.isnan(layer["relative"]) else f"{100 * layer['relative']:.2f} %",
        )
        for layer in difference["layers"]
    ]
    output.table("norms", ("layer", "values", "in A", "in B", "moved", "of A"), layers)


def lineage(folder: Folder, run: Run = None, as_json: Json = False) -> None:
    """Show where a checkpoint comes from: run, start, rounds, data, software, and who signed."""
    from peer.checkpoints.facts import read_facts

    facts = read_facts(folder, parse_run(run), known_of)
    found = facts.lineage()
    if as_json:
        output.print_json(found)
        return
    output.table(f"{folder}: signatures are right; `swarm verify` checks the weights", ("what", "value"), _rows(found))
    sources = [
        (source["path"], source["licence"], source["documents"], source["text_bytes"], source["digest"][:16])
        for source in found["data"]["sources"]
    ]
    output.table("data", ("source", "licence", "documents", "text bytes", "digest"), sources)
    for line in facts.ignored:
        print(f"warning: evaluations/{line}", file=sys.stderr)


def _rows(found: dict[str, Any]) -> list[tuple[str, object]]:
    base, record = found["genesis"]["base"], found["record"]
    rows: list[tuple[str, object]] = [
        ("run", f"{found['run']['name']} ({found['run']['id']})"),
        ("model", f"{found['run']['family']}, {found['num_parameters']:,} parameters, licence {found['licence']}"),
        ("started from", f"{base['name']}, anchor {base['anchor_digest']}" if base else "random weights"),
        ("seed", found["genesis"]["seed"]),
        ("round", f"{found['round']}, after {found['total_tokens']:,} of {found['planned_tokens']:,} tokens"),
        ("state digest", found["state_digest"]),
        ("log digest", found["log_digest"]),
        ("data manifest", found["data"]["manifest_digest"]),
        ("rules signed by", found["signed_by"]["organizer_key"]),
        ("files signed by", found["signed_by"]["publication_key"]),
        ("witnesses", f"{len(found['signed_by']['witnesses'])} of {found['signed_by']['replicas']} live replicas"),
        ("manifest digest", found["signed_by"]["manifest_digest"]),
    ]
    if record is not None:
        names = ", ".join(item["name"] for item in record["contributors"]) or "nobody asked to be named"
        rows += [
            ("software", ", ".join(record["software"]) or "not recorded"),
            ("contributors", f"{record['num_peers']} peers; named: {names}"),
            ("energy", f"{record['energy']['kwh']:.3g} kWh, {record['energy']['co2_kg']:.3g} kg CO2 (estimate)"),
        ]
    rows += [(f"evaluation {item['name']}", f"signed by {item['signer']}") for item in found["evaluations"]]
    return rows
