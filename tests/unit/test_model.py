"""Models from run specs: families, keys, determinism, and the flat layout of their parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.training import device, model
from peer.training.layout import Layout
from swarm.errors import DeviceError, SpecError, SwarmError
from swarm.families import FAMILIES
from swarm.run_spec import Data, Model, RunSpec

VOCAB = 61
HEX = "00" * 32
SMALL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "max_position_embeddings": 32},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 32},
    "gpt_neox": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "mistral": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
    },
}


def spec(family: str = "llama", sequence_length: int = 16, **changes: Any) -> RunSpec:
    return RunSpec(
        name="test",
        total_tokens=1000,
        organizer_key=HEX,
        publication_key="1" * 64,
        model=Model(family=family, config={**SMALL[family], **changes}),
        data=Data(manifest_digest=HEX, tokenizer_digest=HEX, sequence_length=sequence_length),
    )


def flat(module: torch.nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_builds_and_computes_with_gradients_for_every_parameter(family: str) -> None:
    config = model.build_config(spec(family), VOCAB)
    module = model.build_model(config, seed=1)
    tokens = torch.arange(24).reshape(2, 12)
    logits = module(input_ids=tokens, use_cache=False).logits
    assert logits.shape == (2, 12, VOCAB) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_without_memory_is_that_of_the_model(family: str) -> None:
    config = model.build_config(spec(family), VOCAB)
    module = model.build_model(config, seed=1)
    layout = model.build_layout(config)
    assert layout == model.layout_of(module)
    assert layout.num_values == sum(p.numel() for p in module.parameters())


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    config = model.build_config(spec(), VOCAB)
    first, again, other = (flat(model.build_model(config, seed)) for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes() and first.tobytes() != other.tobytes()


def test_building_a_model_leaves_the_random_state_of_the_process_alone() -> None:
    config = model.build_config(spec(), VOCAB)
    before = torch.get_rng_state()
    model.build_model(config, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_has_no_dropout() -> None:
    for family in FAMILIES:
        module = model.build_model(model.build_config(spec(family), VOCAB), seed=1)
        rates = [part.p for part in module.modules() if isinstance(part, torch.nn.Dropout)]
        assert not any(rates), family


BAD_CONFIGS: list[tuple[str, dict[str, Any], int, str]] = [
    ("a mistyped key", {"hiden_size": 16}, 16, "did you mean 'hidden_size'"),
    ("dropout", {"attention_dropout": 0.1}, 16, "unknown key 'attention_dropout'"),
    ("the vocabulary", {"vocab_size": 5}, 16, "unknown key 'vocab_size'"),
    ("code from outside", {"auto_map": "x"}, 16, "unknown key 'auto_map'"),
    ("a width that heads do not divide", {"hidden_size": 15}, 16, "refuses these values"),
    ("a wrong type", {"hidden_size": "16"}, 16, "refuses these values"),
    ("a negative width", {"hidden_size": -2}, 16, "refuses these values"),
    ("no heads", {"num_attention_heads": 0}, 16, "refuses these values"),
    ("no layers", {"num_hidden_layers": 0}, 16, "refuses these values"),
    ("heads that cannot be shared", {"num_key_value_heads": 3}, 16, "refuses these values"),
    ("an unknown activation", {"hidden_act": "silly"}, 16, "refuses these values"),
    ("a token outside the vocabulary", {"eos_token_id": VOCAB}, 16, "no token of a vocabulary"),
    ("sequences beyond the positions", {"max_position_embeddings": 16}, 17, "exceeds the model's 16 positions"),
]


@pytest.mark.parametrize(("name", "changes", "length", "message"), BAD_CONFIGS, ids=[case[0] for case in BAD_CONFIGS])
def test_a_config_that_cannot_train_is_refused_by_name(
    name: str, changes: dict[str, Any], length: int, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        model.build_config(spec(sequence_length=length, **changes), VOCAB)


def test_an_unknown_family_is_refused_with_the_near_name() -> None:
    with pytest.raises(SpecError, match="did you mean 'llama'") as caught:
        model.known_keys("lama")
    assert "mistral" in caught.value.advice


def test_the_rotary_base_can_be_set() -> None:
    config = model.build_config(spec(rope_theta=500.0), VOCAB)
    assert config.rope_parameters["rope_theta"] == 500.0


def test_special_tokens_are_only_those_that_the_spec_names() -> None:
    config = model.build_config(spec(eos_token_id=7), VOCAB)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 7, None)


def test_config_json_opens_as_the_same_model(tmp_path: Path) -> None:
    for family in FAMILIES:
        config = model.build_config(spec(family), VOCAB)
        (tmp_path / "config.json").write_text(model.config_json(config))
        values = json.loads((tmp_path / "config.json").read_text())
        assert values["architectures"][0].endswith("ForCausalLM") and "transformers_version" not in values
        opened = type(config).from_pretrained(tmp_path)
        assert model.build_layout(opened) == model.build_layout(config)
        assert model.config_json(opened) == model.config_json(config)


def test_layout_views_share_the_memory_of_the_vector() -> None:
    layout = Layout.of([("a", (2, 3)), ("b", (4,)), ("c", ())])
    vector = np.arange(11, dtype=np.float32)
    views = layout.views(vector)
    assert {name: view.shape for name, view in views.items()} == {"a": (2, 3), "b": (4,), "c": ()}
    views["a"][1, 2] = 50
    views["c"][...] = 70
    assert vector[5] == 50 and vector[10] == 70
    assert (layout.num_values, layout.size_bytes) == (11, 44)


@pytest.mark.parametrize("vector", [np.zeros(10, np.float32), np.zeros(12, np.float32), np.zeros((1, 11), np.float32)])
def test_a_vector_of_another_length_has_no_views(vector: np.ndarray) -> None:
    layout = Layout.of([("a", (2, 3)), ("b", (5,))])
    with pytest.raises(SwarmError, match="does not hold the 11 values"):
        layout.views(vector)


def test_a_layout_refuses_two_parameters_of_one_name() -> None:
    with pytest.raises(SwarmError, match="twice"):
        Layout.of([("a", (1,)), ("a", (2,))])


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "CPU", "cpu:1", "", "cuda:9999"])
def test_a_device_that_nobody_has_is_refused_with_advice(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        device.choose(name)
    assert caught.value.advice


def test_devices_are_chosen_in_the_order_cuda_mps_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"cuda": 0, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: have["cuda"] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: have["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: have["mps"])
    assert device.choose("auto") == torch.device("cpu")
    for missing in ("cuda", "mps"):
        with pytest.raises(DeviceError):
            device.choose(missing)
    have["mps"] = True
    assert device.choose("auto") == device.choose("mps") == torch.device("mps")
    have["cuda"] = 2
    assert device.choose("auto") == device.choose("cuda") == torch.device("cuda", 0)
    assert device.choose("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="2 found"):
        device.choose("cuda:2")


def test_a_device_is_described_in_a_few_words() -> None:
    assert device.describe(torch.device("cpu"), 1) == "CPU, 1 thread"
    assert device.describe(torch.device("cpu"), 2) == "CPU, 2 threads"
    assert device.describe(torch.device("mps")) == "Apple MPS"
