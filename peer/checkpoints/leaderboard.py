"""Checkpoints side by side: what was measured of each, as rows and as a plot.

Decides how several evaluations of one checkpoint become one number, and how runs are drawn; the door to ``matplotlib``.
Leaves finding checkpoints to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from peer.checkpoints.facts import FolderFacts
from peer.checkpoints.listing import Listing
from swarm import evaluation
from swarm.errors import ConfigError, VerificationError
from swarm.evaluation import SignedEvaluation
from swarm.identity import peer_id_of
from swarm.proto.common_pb2 import Signed

VALIDATION_LOSS = "validation loss"
MAX_PANELS = 12
_FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A checkpoint. ``scores``: by metric, as ``task acc (5-shot)``; ``measured_by``: peer ids of who measured them;
    ``total_tokens``: None where only its digest is known."""

    run: str
    run_id: str
    round: int
    total_tokens: int | None
    scores: dict[str, float]
    measured_by: frozenset[str] = field(default_factory=frozenset)

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "run_id": self.run_id,
            "round": self.round,
            "total_tokens": self.total_tokens,
            "scores": self.scores,
            "measured_by": sorted(self.measured_by),
        }


def row_of_folder(facts: FolderFacts) -> Row:
    """What lies in a checkpoint folder: its evaluations, and the validation loss of its record."""
    manifest, record = facts.provenance.manifest, facts.card.record
    empty = Row(
        run=manifest.run_name,
        run_id=manifest.run_id,
        round=manifest.round,
        total_tokens=manifest.total_tokens,
        scores={VALIDATION_LOSS: record.validation_loss} if record and record.validation_loss is not None else {},
    )
    return with_evaluations(empty, facts.evaluations)


def with_evaluations(row: Row, found: Sequence[SignedEvaluation]) -> Row:
    """``row`` with what was measured of it, and by whom."""
    scores = row.scores | scores_of(found)
    return replace(row, scores=scores, measured_by=frozenset(peer_id_of(item.signer) for item in found))


def rows_of_listing(listing: Listing) -> list[Row]:
    """What a mirror tells of a run's checkpoints: losses of their records, evaluations that later records carry."""
    rows = []
    for item in listing.checkpoints:
        loss = item.record.validation_loss if item.record is not None else None
        row = Row(
            run=listing.spec.name,
            run_id=listing.spec.run_id.hex(),
            round=item.entry.round,
            total_tokens=item.manifest.total_tokens if item.manifest is not None else None,
            scores={} if loss is None else {VALIDATION_LOSS: loss},
        )
        rows.append(with_evaluations(row, listing.evaluations(item.entry.manifest_digest)))
    return rows


def told_evaluations(told: Sequence[Signed], run_id: bytes, manifest_digest: bytes) -> list[SignedEvaluation]:
    """Of what a coordinator tells, each that its signer signed and that is of this very checkpoint."""
    found = []
    for signed in told:
        with suppress(VerificationError):
            found.append(evaluation.open_signed(signed, run_id))
    return [item for item in found if item.evaluation.manifest_digest == manifest_digest.hex()]


def scores_of(found: Sequence[SignedEvaluation]) -> dict[str, float]:
    """One number a metric: the median over people, each with the median of its own whole evaluations; over limited
    ones where there is no whole one.

    The median, since who tells a false result, however often, must not move what most others found.
    """
    scores = _medians([item for item in found if item.evaluation.limit is not None])
    scores |= _medians([item for item in found if item.evaluation.limit is None])
    return dict(sorted(scores.items()))


def merged(rows: Sequence[Row]) -> list[Row]:
    """One row a checkpoint, by run and round; scores of the same checkpoint from two sources side by side."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row.run_id, row.round)
        old = found.get(key)
        if old is not None:
            tokens = old.total_tokens if row.total_tokens is None else row.total_tokens
            scores, people = old.scores | row.scores, old.measured_by | row.measured_by
            row = replace(row, total_tokens=tokens, scores=scores, measured_by=people)
        found[key] = row
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
    rows = [row for row in rows if row.total_tokens is not None]  # the others have no place over tokens
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


def _medians(found: Sequence[SignedEvaluation]) -> dict[str, float]:
    values: dict[str, dict[bytes, list[float]]] = {}
    for item in found:
        for result in item.evaluation.results:
            shots = f" ({result.num_fewshot}-shot)" if result.num_fewshot else ""
            by_signer = values.setdefault(f"{result.task} {item.evaluation.metric(result)}{shots}", {})
            by_signer.setdefault(item.signer, []).append(result.value)
    return {name: median(map(median, by_signer.values())) for name, by_signer in values.items()}
