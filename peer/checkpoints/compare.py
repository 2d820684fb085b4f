"""What changed between two checkpoints: rounds, tokens, data, and how far each layer moved.

Decides how parameters are grouped into layers and what is measured: the Euclidean norm of a group in each, and of the
difference. Reads one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from peer.checkpoints.facts import FolderFacts
from peer.checkpoints.sets import held_set
from peer.checkpoints.weights import Weights
from swarm.errors import DataError
from swarm.families import Family, family_of

OnTensor = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """Norms over all parameters of a layer, in the first, in the second, and of second minus first."""

    layer: str
    num_values: int
    norm_a: float
    norm_b: float
    moved: float

    @property
    def relative(self) -> float:
        """``moved`` over ``norm_a``; NaN where that is 0."""
        return self.moved / self.norm_a if self.norm_a else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    a: FolderFacts
    b: FolderFacts
    layers: tuple[LayerChange, ...]

    def as_json(self) -> dict[str, Any]:
        spec_a, spec_b = self.a.provenance.spec, self.b.provenance.spec
        manifest_a, manifest_b = self.a.provenance.manifest, self.b.provenance.manifest
        rules_a, rules_b = spec_a.model_dump(mode="json"), spec_b.model_dump(mode="json")
        return {
            "a": _side(self.a),
            "b": _side(self.b),
            "same_run": manifest_a.run_id == manifest_b.run_id,
            "starts_from_a": _starts_from(self.b, self.a),
            "rounds": manifest_b.round - manifest_a.round,
            "tokens": manifest_b.total_tokens - manifest_a.total_tokens,
            "same_data": spec_a.data.manifest_digest == spec_b.data.manifest_digest,
            "rules_changed": sorted(name for name in rules_a if rules_a[name] != rules_b[name]),
            "sources_only_in_a": _sources_beyond(self.a, self.b),
            "sources_only_in_b": _sources_beyond(self.b, self.a),
            "layers": [
                {
                    "layer": change.layer,
                    "num_values": change.num_values,
                    "norm_a": change.norm_a,
                    "norm_b": change.norm_b,
                    "moved": change.moved,
                    "relative": change.relative,
                }
                for change in self.layers
            ],
        }


def compare(a: FolderFacts, b: FolderFacts, on_tensor: OnTensor = lambda: None) -> Difference:
    """Raises `DataError` where the two are not of one shape, so that no layer can be compared."""
    weights_a, weights_b = (Weights(side.folder, side.provenance.manifest) for side in (a, b))
    if weights_a.shapes != weights_b.shapes:
        differing = sorted(set(weights_a.shapes.items()) ^ set(weights_b.shapes.items()))[0][0]
        raise DataError(
            f"the two models are not of one shape (first difference: {differing[:80]})",
            "compare checkpoints of runs with the same model",
        )
    family = family_of(a.provenance.spec.model.family)
    sums: dict[str, list[float]] = {}
    for name in weights_a.shapes:
        first, second = weights_a.read(name).ravel(), weights_b.read(name).ravel()
        sizes = sums.setdefault(layer_of(name, family), [0.0, 0.0, 0.0, 0.0])
        for place, value in enumerate((first, second, second - first)):
            # Squares of fp32 are summed in fp64, block by block: no copy of the whole tensor in fp64.
            sizes[place] += sum(
                float(np.square(value[start : start + (1 << 20)], dtype=np.float64).sum())
                for start in range(0, value.size, 1 << 20)
            )
        sizes[3] += first.size
        on_tensor()
    changes = [
        LayerChange(
            layer=layer, num_values=int(size), norm_a=math.sqrt(one), norm_b=math.sqrt(two), moved=math.sqrt(moved)
        )
        for layer, (one, two, moved, size) in sums.items()
    ]
    return Difference(a=a, b=b, layers=tuple(sorted(changes, key=lambda change: _order(change.layer, family))))


def layer_of(name: str, family: Family) -> str:
    """``layer 3`` for what lies in the list of layers, else the part's own name: ``embed_tokens``, ``lm_head``."""
    parts = name.removeprefix(f"{family.base}.").split(".")
    if parts[0] == family.layers and len(parts) > 1 and parts[1].isdigit():
        return f"layer {int(parts[1])}"
    return parts[0]


def _order(layer: str, family: Family) -> tuple[int, int, str]:
    """As the model runs: what comes before the layers, the layers, the norm, the head."""
    if layer.startswith("layer "):
        return 1, int(layer.removeprefix("layer ")), ""
    return {family.norm: 2, family.head: 3}.get(layer, 0), 0, layer


def _side(facts: FolderFacts) -> dict[str, Any]:
    listed = facts.provenance.manifest
    return {
        "folder": str(facts.folder),
        "run": listed.run_name,
        "run_id": listed.run_id,
        "round": listed.round,
        "dtype": held_set(facts.folder, listed).dtype,
        "total_tokens": listed.total_tokens,
        "state_digest": listed.state_digest,
        "data_manifest_digest": listed.data_manifest_digest,
        "train_tokens": facts.card.data.train_tokens,
    }


def _starts_from(later: FolderFacts, earlier: FolderFacts) -> bool | None:
    """Whether the run of ``later`` began with the very weights of ``earlier``; None: by the digests of several shards
    that cannot be told."""
    base, listed = later.provenance.spec.base, earlier.provenance.manifest
    if base is None:
        return False
    return base.anchor_digest == listed.anchor.digest if len(listed.states) == 1 else None


def _sources_beyond(these: FolderFacts, those: FolderFacts) -> list[str]:
    """Paths of sources whose documents the other does not have as a source."""
    known = {source.digest for source in those.card.data.sources}
    return [source.path for source in these.card.data.sources if source.digest not in known]
