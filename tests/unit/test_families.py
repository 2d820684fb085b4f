"""The family table: complete, and clear about what it does not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from peer.training import model
from peer.training.span import cut
from swarm.errors import SpecError, SwarmError
from swarm.families import FAMILIES, TABLE, Family, family_of
from swarm.run_spec import Model
from swarm.sharding import from_sizes, whole
from tests.unit.small_models import VOCAB, small_config, small_spec


def test_adding_a_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an entry in the table, and nothing else, a spec may name the family and its model is built and cut."""
    values = {"family": "phi", "config": {"hidden_size": 16}}
    with pytest.raises(ValidationError, match=r"one entry in swarm/families\.py"):
        Model.model_validate(values)
    entry = Family(base="model", embedding="embed_tokens", layers="layers", norm="final_layernorm", rotary="rotary_emb")
    monkeypatch.setitem(TABLE, "phi", entry)
    assert Model.model_validate(values).family == "phi"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    spec = small_spec("llama").model_copy(update={"model": Model(family="phi", config=sizes)})
    config = model.build_config(spec, VOCAB)
    together = [model.initial_anchor(config, 0, span) for span in from_sizes((1, 2))]
    assert np.concatenate(together).tobytes() == model.initial_anchor(config, 0).tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_names_every_part_with_parameters_and_nothing_else(family: str) -> None:
    config = small_config(family)
    names = [entry.name for entry in model.build_layout(config).entries]
    entry = family_of(family)
    base = model.build_model(config, seed=0).get_submodule(entry.base)
    assert entry.children <= {name for name, _ in base.named_children()}
    parts = {name.split(".")[1] for name in names if name.startswith(f"{entry.base}.")}
    assert parts == entry.children - {entry.rotary}
    assert {name.split(".")[0] for name in names} == {entry.base, entry.head}


@pytest.mark.parametrize(
    ("name", "near"), [("lama", "llama"), ("gpt-neox", "gpt_neox"), ("Mistral", "mistral"), ("qwen9", "")]
)
def test_an_unknown_family_is_refused_and_the_known_ones_are_listed(name: str, near: str) -> None:
    with pytest.raises(SpecError, match=f"unknown model family '{name}'") as caught:
        family_of(name)
    assert f"did you mean '{near}'" in str(caught.value) if near else "did you mean" not in str(caught.value)
    assert caught.value.advice.startswith("known families: " + ", ".join(TABLE))


WRONG_ENTRIES = [
    ("a part is left out", Family(base="transformer", embedding="wte", layers="h", norm="ln_f")),
    ("the layers are elsewhere", Family(base="transformer", embedding="wte", layers="ln_f", norm="h", positions="wpe")),
    ("the layers are nowhere", Family(base="transformer", embedding="wte", layers="x", norm="ln_f", positions="wpe")),
]


@pytest.mark.parametrize(("name", "entry"), WRONG_ENTRIES, ids=[name for name, _ in WRONG_ENTRIES])
def test_an_entry_that_does_not_fit_its_family_is_refused(name: str, entry: Family) -> None:
    config = small_config("gpt_neo")
    built: torch.nn.Module = model.build_model(config, seed=0)
    with pytest.raises(SwarmError, match="the family table does not know"):
        cut(built, entry, whole(config.num_hidden_layers))
