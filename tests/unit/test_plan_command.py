"""`swarm plan`: tables for people, one object for programs, named errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from swarm import presets, run_file
from swarm.cli.plan import plan
from swarm.errors import ConfigError, SpecError
from swarm.fitting import parse_bytes

app = typer.Typer()
app.command()(plan)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "run.toml"
    target.write_text(run_file.render(presets.preset("demo", "planned")), encoding="utf-8")
    return target


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_plan_names_every_span_with_its_components_and_the_cards(path: Path) -> None:
    values = json.loads(run(path, "--json", "--shards", 2, "--vocabulary", 500))
    assert [span["span"] for span in values["spans"]][-1] == "layers 0-1 + embedding + head"
    assert (values["shards"], len(values["spans"]), values["vocabulary"]) == (2, 3, 500)
    for span in values["spans"]:
        assert span["held bytes"] == sum(span["held"].values())
        assert span["device bytes"] == span["held bytes"] + max(
            sum(phase.values()) for phase in span["phases"].values()
        )
        assert span["host bytes"] == sum(span["host"].values())
    assert {card["largest span"] for card in values["cards"]} == {"layers 0-1 + embedding + head"}


def test_memory_asks_about_one_card(path: Path) -> None:
    cards = json.loads(run(path, "--json", "--memory", "600MiB"))["cards"]
    assert cards == [{"card": "--memory", "memory bytes": 600 << 20, "largest span": None, "sequences at once": 0}]
    assert json.loads(run(path, "--json", "--memory", "680MiB", "--device", "cpu"))["cards"][0]["largest span"]


def test_a_plan_says_what_a_joining_peer_would_choose(path: Path) -> None:
    """Also where only a part of a microbatch fits at once."""
    sizes = [json.loads(run(path, "--json", "--memory", f"{mib}MiB"))["cards"][0] for mib in (750, 4096)]
    assert [card["largest span"] for card in sizes] == ["layers 0-1 + embedding + head"] * 2
    assert 1 <= sizes[0]["sequences at once"] < sizes[1]["sequences at once"]


def test_for_people_there_are_tables(path: Path) -> None:
    text = run(path)
    for words in ("planned on cuda: 1 shard(s)", "RTX 4090", "int8 weights", "anchor", "layers 0-1 + embedding + head"):
        assert words in text


def test_more_shards_than_layers_are_refused(path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be cut into 5 shards"):
        run(path, "--shards", 5)


def test_an_unknown_device_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="'tpu' is unknown"):
        run(path, "--device", "tpu")


SIZES = [("8GiB", 8 << 30), ("8 gb", 8 * 10**9), ("1.5MiB", 3 << 19), ("1000", 1000), (" 2KB ", 2000)]


@pytest.mark.parametrize(("text", "expected"), SIZES)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8TiBB", "1e9", "0", "8 GiB free", "nan", "9" * 40])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)
