"""Run files and presets: what is rendered parses to the same, and a slip of the pen is named."""

from __future__ import annotations

from typing import Any

import pytest

from swarm import presets, run_file
from swarm.data_manifest import DataManifest
from swarm.errors import ConfigError, SpecError
from swarm.run_file import RunFile
from swarm.run_spec import RunSpec

MINIMAL = 'name = "x"\ntotal_tokens = 5\n[model]\nfamily = "llama"\n'


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_survives_being_written_and_read(name: str) -> None:
    """``parse(render(x)) == x`` for every preset."""
    preset = presets.preset(name, "my-run")
    assert run_file.parse(run_file.render(preset)) == preset


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_key_of_a_rendered_file_is_explained(name: str) -> None:
    """Outside the model's own config, each key has a comment; each line fits a screen."""
    own = run_file.render(presets.preset(name, "x")).split("[model.config]")
    lines = [*own[0].splitlines(), *own[1].partition("[inner]")[2].splitlines()]
    assert all(" # " in line for line in lines if "=" in line)
    assert max(len(line) for line in lines) <= 140


MIRRORS = {
    "none": ("", ()),
    "a bucket is told": ('write = ["s3://b/x"]', ("s3://b/x",)),
    "a folder of the organizer's is not": ('write = ["file:///srv/www", "hf://o/n"]', ("hf://o/n",)),
    "what researchers read is told instead": ('write = ["file:///w"]\nread = ["https://h/x"]', ("https://h/x",)),
}


@pytest.mark.parametrize(("text", "told"), MIRRORS.values(), ids=MIRRORS.keys())
def test_mirrors_are_no_rule_of_the_run_and_told_as_researchers_reach_them(text: str, told: tuple[str, ...]) -> None:
    parsed = run_file.parse(f"{MINIMAL}[mirrors]\n{text}\n")
    assert parsed.mirrors.told == told
    assert run_file.parse(run_file.render(parsed)) == parsed
    assert "mirrors" not in RunSpec.model_fields


@pytest.mark.parametrize("url", ["/srv/www", "", "s3:// b", "S3://b", "file:"])
def test_a_mirror_that_is_no_url_is_named(url: str) -> None:
    with pytest.raises(SpecError, match=r"mirrors\.write"):
        run_file.parse(f'{MINIMAL}[mirrors]\nwrite = ["{url}"]\n')


def test_awkward_values_survive() -> None:
    """Quotes, control characters, other alphabets, tiny and huge numbers, keys that need quotes."""
    config: dict[str, Any] = {
        "a b": '"\\\n\x7f\x00é😀',
        "flag": True,
        "list": [[1, 2.5], ["x"], []],
        "tiny": 1e-300,
        "big": 1e16,
    }
    strange = RunFile.model_validate({"name": "x", "total_tokens": 5, "model": {"family": "bloom", "config": config}})
    again = run_file.parse(run_file.render(strange))
    assert again == strange
    assert again.model.config["flag"] is True


def test_defaults_fill_what_a_file_leaves_out() -> None:
    """Four lines are a run file."""
    parsed = run_file.parse(MINIMAL)
    assert parsed.data.path == "data"
    assert parsed.rounds == RunSpec.model_fields["rounds"].default


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "near name",
            MINIMAL + "[rounds]\ntoken_per_round = 5\n",
            "run.toml: unknown key 'rounds.token_per_round' (did you mean 'tokens_per_round'?)",
        ),
        ("near section", MINIMAL + "[round]\n", "unknown key 'round' (did you mean 'rounds'?)"),
        ("key of the spec alone", "organizer_key = 'aa'\n" + MINIMAL, "unknown key 'organizer_key'"),
        ("digest in a file", MINIMAL + "[data]\nmanifest_digest = 'a'\n", "unknown key 'data.manifest_digest'"),
        ("syntax", 'name = "x"\ntotal_tokens 5\n', "(at line 2, column 14)"),
        ("key twice", MINIMAL + 'family = "llama"\n', "at line 5"),
        ("cut short", MINIMAL[:8], "run.toml: "),
        ("not a number", MINIMAL + "[inner]\nlearning_rate = nan\n", "inner.learning_rate"),
        ("a date", MINIMAL + "config = {x = 2024-01-01}\n", "'x' must hold"),
        ("deeply nested", MINIMAL + "config = {x = " + "[" * 5000 + "]" * 5000 + "}\n", "run.toml: "),
        ("too large", MINIMAL + "#" * 300_000, "larger than"),
        ("vocabulary", MINIMAL + "config = {vocab_size = 7}\n", "vocab_size comes from the data's tokenizer"),
        (
            "sequence too long",
            MINIMAL + "config = {max_position_embeddings = 64}\n",
            "data.sequence_length must not exceed model.config.max_position_embeddings (64)",
        ),
    ],
)
def test_a_bad_file_is_named(name: str, text: str, message: str) -> None:
    """The error says where in the file, and what is meant instead."""
    with pytest.raises(SpecError) as caught:
        run_file.parse(text)
    assert message in str(caught.value)
    assert caught.value.advice or "larger" in message


def _manifest(train_tokens: int = 1000, validation_tokens: int = 1000) -> DataManifest:
    shard = {"digest": "aa" * 32}
    return DataManifest.model_validate(
        {
            "tokenizer_digest": "bb" * 32,
            "vocab_size": 512,
            "end_of_text_id": 3,
            "dtype": "uint16",
            "train": [{**shard, "file": "train-00000.bin", "num_tokens": train_tokens}],
            "validation": [{**shard, "file": "validation-00000.bin", "num_tokens": validation_tokens}],
            "sources": [],
        }
    )


def _to_spec(manifest: DataManifest) -> RunSpec:
    return run_file.to_spec(
        presets.demo("x"),
        organizer_key=b"o" * 32,
        publication_key=b"p" * 32,
        manifest=manifest,
        manifest_digest="cc" * 32,
    )


def test_a_spec_takes_rules_from_the_file_and_facts_from_the_data() -> None:
    """Digests and the end of a text come from the data; everything else from the file."""
    spec, source = _to_spec(_manifest()), presets.demo("x")
    assert (spec.data.manifest_digest, spec.data.tokenizer_digest) == ("cc" * 32, "bb" * 32)
    assert (spec.organizer_key, spec.publication_key) == (b"o".hex() * 32, b"p".hex() * 32)
    facts = {"eos_token_id": 3, "bos_token_id": 3}
    assert spec.model.config == source.model.config | facts
    assert (spec.inner, spec.rounds, spec.total_tokens) == (source.inner, source.rounds, source.total_tokens)


@pytest.mark.parametrize(("train", "validation", "match"), [(128, 1000, "no train"), (1000, 128, "no validation")])
def test_data_without_one_sequence_is_refused(train: int, validation: int, match: str) -> None:
    """129 tokens make one sequence of 128; 128 make none."""
    assert _to_spec(_manifest(129, 129)).data.sequence_length == 128
    with pytest.raises(SpecError, match=match):
        _to_spec(_manifest(train, validation))


def test_an_unknown_preset_suggests_a_near_one() -> None:
    """The advice lists them all."""
    with pytest.raises(ConfigError, match=r"'lama-1b' \(did you mean 'llama-1b'\?\)") as caught:
        presets.preset("lama-1b", "x")
    assert "mistral-7b" in caught.value.advice


def test_presets_have_their_published_sizes() -> None:
    """Hidden size, layers and intermediate size of the models that they name."""
    gpt, llama, mistral = (presets.PRESETS[name]("x").model for name in ("gpt-125m", "llama-1b", "mistral-7b"))
    assert (gpt.config["hidden_size"], gpt.config["num_layers"]) == (768, 12)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [llama.config[key] for key in keys] == [2048, 22, 32, 4, 5632]
    assert [mistral.config[key] for key in keys] == [4096, 32, 32, 8, 14336]


def test_the_preset_of_a_large_run_follows_from_its_parameters() -> None:
    """Twenty tokens per parameter, and rounds that grow to a thousandth of the run."""
    run = presets.llama_1b("x")
    assert run.total_tokens == 22_000_000_000
    assert run.rounds.tokens_per_round == 22_000_000
    assert run.rounds.first_tokens_per_round == 2_200_000
