"""`swarm plan`: what a run's spans take, and on which cards they fit, before anybody buys or starts anything.

Only wiring: a run file becomes the figures of `peer.training.model`, plans become tables.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from swarm.fitting import Choice, Room
    from swarm.memory_plan import MemoryPlan, ModelNumbers
    from swarm.pipeline_plan import SpanSpeed
    from swarm.run_file import RunFile
    from swarm.sharding import Span

DEFAULT_VOCABULARY = 32_000  # of LLaMA and Mistral; used until the data is prepared
NO_HOST_LIMIT = 1 << 62


def plan(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file that `swarm init` wrote.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of a card to try, for example 8GiB.")] = "",
    shards: Annotated[int, typer.Option(min=0, help="Cut the model into so many; 0: as the run file says.")] = 0,
    device: Annotated[str, typer.Option(help="cuda, mps or cpu.")] = "cuda",
    vocabulary: Annotated[int, typer.Option(min=0, help="Words, where the data is not prepared yet.")] = 0,
    tflops: Annotated[float, typer.Option(help="What a card sustains in training, in 10^12 operations a second.")] = 20,
    uplink: Annotated[float, typer.Option(metavar="MBIT", help="A home's uplink in Mbit/s.")] = 20,
    downlink: Annotated[float, typer.Option(metavar="MBIT", help="A home's downlink in Mbit/s.")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how much memory each span of a run takes, which cards it fits, and how busy its peers would be."""
    from swarm import fitting, memory_plan, pipeline_plan, sharding
    from swarm.cli import output

    if device not in fitting.RUNTIME_BYTES:
        raise ConfigError(f"--device {device!r} is unknown", "choose one of: " + ", ".join(fitting.RUNTIME_BYTES))
    wanted = fitting.parse_bytes(memory) if memory else None
    machine = pipeline_plan.Machine(flops=tflops * 1e12, uplink_bps=uplink * 1e6, downlink_bps=downlink * 1e6)
    rules = _read(run_file)
    working = fitting.working(rules.inner, device)
    words = vocabulary or _prepared_vocabulary(run_file, rules) or DEFAULT_VOCABULARY
    numbers_of = functools.cache(lambda batch: _numbers(rules, shards, words, device, batch))
    numbers = numbers_of(rules.inner.microbatch_sequences)
    pieces = sharding.split(len(numbers.layers), shards or rules.num_shards, memory_plan.piece_values(numbers))
    plans = [memory_plan.plan(numbers, span, working) for span in sharding.spans(pieces)]

    def choose(room: Room) -> Choice:
        return fitting.choose(numbers_of, pieces, working, rules.inner.microbatch_sequences, room)

    def speed(span: Span) -> SpanSpeed:
        return pipeline_plan.span_speed(numbers, span, working, machine, rules.pipeline.hop_codec)

    values = {
        "run": rules.name,
        "device": device,
        "vocabulary": words,
        "sequences": numbers.activations.batch,
        "sequence length": numbers.activations.sequence,
        "shards": len(pieces),
        "spans": [_span_values(planned) | _speed_values(speed(planned.span)) for planned in plans],
        "machine": {"tflops": tflops, "uplink mbit/s": uplink, "downlink mbit/s": downlink},
        "cards": [_card(name, size, choose) for name, size in _sizes(wanted)],
    }
    if json:
        output.print_json(values)
    else:
        _print(values)


def _read(path: Path) -> RunFile:
    from swarm.run_file import parse

    return parse(path.read_text(encoding="utf-8"), str(path))


def _prepared_vocabulary(path: Path, rules: RunFile) -> int:
    """The vocabulary's size out of the run's prepared data; 0 where there is none yet."""
    from swarm import data_manifest

    manifest = path.parent / rules.data.path / data_manifest.MANIFEST_NAME
    return data_manifest.parse(manifest.read_bytes()).vocab_size if manifest.is_file() else 0


def _numbers(rules: RunFile, shards: int, vocabulary: int, device: str, batch: int) -> ModelNumbers:
    from peer.training import model

    cut = rules.model_copy(update={"num_shards": shards or rules.num_shards})
    config = model.build_config(cut, vocabulary)
    return model.measure(config, batch=batch, sequence=rules.data.sequence_length, in_bf16=device == "cuda")


def _span_values(planned: MemoryPlan) -> dict[str, Any]:
    return {
        "span": str(planned.span),
        "first layer": planned.span.first,
        "last layer": planned.span.last - 1,
        "parameters": planned.num_values,
        "device bytes": planned.device_bytes,
        "held bytes": planned.held_bytes,
        "host bytes": planned.host_bytes,
        "held": dict(planned.held),
        "phases": {name: dict(phase) for name, phase in planned.phases.items()},
        "host": dict(planned.host),
    }


def _speed_values(speed: SpanSpeed) -> dict[str, Any]:
    return {
        "tokens/s": round(speed.tokens_per_s, 1),
        "utilisation": round(speed.utilisation, 4),
        "bound by": speed.bound_by,
    }


def _sizes(wanted: int | None) -> list[tuple[str, int]]:
    from swarm import fitting

    return [("--memory", wanted)] if wanted is not None else [(name, gib * fitting.GIB) for name, gib in fitting.CARDS]


def _card(name: str, size: int, choose: Callable[[Room], Choice]) -> dict[str, Any]:
    """What a peer with such a card would choose when it joins."""
    from swarm import fitting

    row: dict[str, Any] = {"card": name, "memory bytes": size, "largest span": None, "sequences at once": 0}
    try:
        choice = choose(fitting.Room(device_bytes=size, host_bytes=NO_HOST_LIMIT))
    except ResourceError:
        return row
    return row | {"largest span": str(choice.plan.span), "sequences at once": choice.batch}


def _print(values: dict[str, Any]) -> None:
    from swarm.cli import output
    from swarm.fitting import gib

    batch = f"{values['sequences']} sequences of {values['sequence length']} tokens, {values['vocabulary']} words"
    columns = ["span", "parameters", "device", "of it held", "host"]
    rows = [
        [
            span["span"],
            f"{span['parameters']:,}",
            gib(span["device bytes"]),
            gib(span["held bytes"]),
            gib(span["host bytes"]),
        ]
        for span in values["spans"]
    ]
    output.table(f"{values['run']} on {values['device']}: {values['shards']} shard(s), {batch}", columns, rows)
    whole = values["spans"][-1]
    parts = [("held", whole["held"]), *whole["phases"].items(), ("host", whole["host"])]
    rows = [[where, name, gib(size)] for where, sizes in parts for name, size in sizes.items() if size]
    output.table(f"{whole['span']}, by component", ["when", "what", "bytes"], rows)
    rows = [
        [span["span"], f"{span['tokens/s']:,.0f}", f"{span['utilisation']:.0%}", span["bound by"]]
        for span in values["spans"]
    ]
    machine = values["machine"]
    link = f"{machine['uplink mbit/s']:g} Mbit/s up, {machine['downlink mbit/s']:g} down"
    title = f"A peer with {machine['tflops']:g} TFLOP/s and {link}"
    output.table(title, ["span", "tokens/s", "busy", "bound by"], rows)
    cards = [
        [card["card"], gib(card["memory bytes"]), card["largest span"] or "none", card["sequences at once"]]
        for card in values["cards"]
    ]
    output.table("Cards", ["card", "memory", "largest span", "sequences at once"], cards)
