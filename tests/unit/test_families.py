"""The family table: complete, and clear about what it does not know."""

from __future__ import annotations

import pytest
import torch

from peer.training import model
from peer.training.families import TABLE, Family, family_of
from peer.training.span import cut
from swarm.errors import SpecError, SwarmError
from swarm.run_spec import FAMILIES
from swarm.sharding import whole
from tests.unit.small_models import small_config


def test_the_table_knows_the_families_that_a_spec_may_name() -> None:
    assert tuple(TABLE) == FAMILIES


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
    assert caught.value.advice == "known families: " + ", ".join(TABLE)


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
