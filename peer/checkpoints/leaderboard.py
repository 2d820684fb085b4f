"""Checkpoints side by side: what was measured of each, as rows and as a plot.

Decides how several evaluations of one checkpoint become one number, and how runs are drawn; the door to ``matplotlib``.
Leaves finding checkpoints to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.checkpoints.facts import FolderFacts
from swarm.errors import ConfigError
from swarm.evaluation import Evaluation

VALIDATION_LOSS = "validation loss"
MAX_PANELS = 12
_FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A checkpoint. ``scores``: by metric, as ``task acc (5-shot)``."""

    run: str
    run_id: str
    round: int
    total_tokens: int
    scores: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "run_id": self.run_id,
            "round": self.round,
            "total_tokens": self.total_tokens,
            "scores": self.scores,
        }


def row_of_folder(facts: FolderFacts) -> Row:
    """What lies in a checkpoint folder: its evaluations, and the validation loss of its record."""
    manifest, record = facts.provenance.manifest, facts.card.record
    scores = scores_of([item.evaluation for item in facts.evaluations])
    if record is not None and record.validation_loss is not None:
        scores = {VALIDATION_LOSS: record.validation_loss, **scores}
    return Row(
        run=manifest.run_name,
        run_id=manifest.run_id,
        round=manifest.round,
        total_tokens=manifest.total_tokens,
        scores=scores,
    )


def scores_of(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """One number a metric: the mean over whole evaluations, or over limited ones where there is no whole one."""
    found = _values([item for item in evaluations if item.limit is not None])
    found |= _values([item for item in evaluations if item.limit is None])
    return {name: math.fsum(values) / len(values) for name, values in sorted(found.items())}


def merged(rows: Sequence[Row]) -> list[Row]:
    """One row a checkpoint, by run and round; scores of the same checkpoint from two sources side by side."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row.run_id, row.round)
        old = found.get(key)
        scores = {**old.scores, **row.scores} if old is not None else row.scores
        found[key] = Row(run=row.run, run_id=row.run_id, round=row.round, total_tokens=row.total_tokens, scores=scores)
    return sorted(found.values(), key=lambda row: (row.run, row.run_id, row.round))


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Every metric that any row has; the validation loss first."""
    names = {name for row in rows for name in row.scores}
    return sorted(names, key=lambda name: (name != VALIDATION_LOSS, name))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw every metric over tokens, a line a run, into an SVG, PNG or PDF file.

    Raises `ConfigError` for another ending, without matplotlib, or where there is nothing to draw.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path} is no picture that can be drawn", f"let it end in {', '.join(_FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("matplotlib is not installed", "pip install 'swarmtrain[eval]'") from error
    metrics = metrics_of(rows)[:MAX_PANELS]
    if not metrics:
        raise ConfigError("nothing was measured of these checkpoints", "measure some: swarm eval DIR --tasks ...")
    columns = min(3, len(metrics))
    figure = Figure(figsize=(5 * columns, 3.6 * -(-len(metrics) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(metrics) // columns), columns, squeeze=False).ravel()
    for metric, panel in zip(metrics, axes, strict=False):
        for run_id in dict.fromkeys(row.run_id for row in rows):
            points = [row for row in rows if row.run_id == run_id and metric in row.scores]
            if points:
                tokens = [row.total_tokens for row in points]
                panel.plot(tokens, [row.scores[metric] for row in points], marker="o", label=points[0].run)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("tokens")
    for panel in axes[len(metrics) :]:
        panel.set_visible(False)
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _values(evaluations: Sequence[Evaluation]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item in evaluations:
        for result in item.results:
            shots = f" ({result.num_fewshot}-shot)" if result.num_fewshot else ""
            found.setdefault(f"{result.task} {result.metric}{shots}", []).append(result.value)
    return found
