"""The model families: where each keeps the parts that a span may own or lack.

One table; adding a family is one entry here. A run spec may name what is in it, `peer.training.span` cuts by it,
`peer.training.pretrained` reads files by it, `peer.training.model` asks transformers for the rest; the tests want a
small config of it in ``tests/unit/small_models.py``. Keys are transformers' model types, names are attributes of the
family's causal language model in transformers 5.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from swarm.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    base: str
    """attribute of the causal language model that holds everything but the head"""
    embedding: str
    """in the base: tokens to vectors; first span only"""
    layers: str
    """in the base: the list of layers"""
    norm: str
    """in the base: the norm after the last layer; last span only"""
    head: str = "lm_head"
    """beside the base: vectors to logits; last span only"""
    positions: str | None = None
    """in the base: a learned position embedding, added to the tokens' vectors; first span only"""
    embedding_norm: str | None = None
    """in the base: a norm right after the embedding; first span only"""
    rotary: str | None = None
    """in the base: angles of positions for all layers, without parameters; every span keeps it"""
    older_names: tuple[tuple[str, str], ...] = ()
    """(prefix in older checkpoints, prefix today)"""

    @property
    def children(self) -> frozenset[str]:
        """Every part of the base that the table knows."""
        names = (self.embedding, self.layers, self.norm, self.positions, self.embedding_norm, self.rotary)
        return frozenset(name for name in names if name)


TABLE: dict[str, Family] = {
    "gpt_neo": Family(base="transformer", embedding="wte", layers="h", norm="ln_f", positions="wpe"),
    "gptj": Family(base="transformer", embedding="wte", layers="h", norm="ln_f"),
    "gpt_neox": Family(
        base="gpt_neox",
        embedding="embed_in",
        layers="layers",
        norm="final_layer_norm",
        rotary="rotary_emb",
        older_names=(("embed_out.", "lm_head."),),
    ),
    "bloom": Family(
        base="transformer",
        embedding="word_embeddings",
        layers="h",
        norm="ln_f",
        embedding_norm="word_embeddings_layernorm",
    ),
    "llama": Family(base="model", embedding="embed_tokens", layers="layers", norm="norm", rotary="rotary_emb"),
    "mistral": Family(base="model", embedding="embed_tokens", layers="layers", norm="norm", rotary="rotary_emb"),
}

FAMILIES = tuple(TABLE)


def family_of(name: str) -> Family:
    """The family called ``name``. Raises `SpecError` with the near name, and all known ones as advice."""
    family = TABLE.get(name)
    if family is None:
        near = difflib.get_close_matches(name, TABLE, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SpecError(
            f"unknown model family {name[:60]!r}{hint}",
            f"known families: {', '.join(TABLE)}; another one is one entry in swarm/families.py",
        )
    return family
