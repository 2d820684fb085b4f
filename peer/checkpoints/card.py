"""The model card, README.md: what a checkpoint is, what made it, and how to check that.

Decides the card's text and its front matter; every figure comes from `CardFacts`, so that the same facts make the same
card. This is a door to ``huggingface_hub``, whose `ModelCard` and `ModelCardData` make and read the front matter.
Leaves collecting facts to `peer.checkpoints.checkpoint` (assembly) and `peer.checkpoints.facts` (a folder on disk).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from swarm import evaluation
from swarm.data_manifest import DataManifest
from swarm.errors import DataError
from swarm.evaluation import Result, SignedEvaluation
from swarm.identity import peer_id_of
from swarm.manifest import ShardState
from swarm.run_record import RunRecord
from swarm.run_spec import RunSpec

MAX_ROWS = 100
_LICENCES = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "gpl-3.0",
        "lgpl-3.0",
        "agpl-3.0",
        "mpl-2.0",
        "openrail",
        "bigscience-openrail-m",
        "bigscience-bloom-rail-1.0",
        "creativeml-openrail-m",
        "llama2",
        "llama3",
        "gemma",
        "odc-by",
        "odbl",
        "unlicense",
        "wtfpl",
        "zlib",
        "isc",
        "artistic-2.0",
        "unknown",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """``record`` is None where the coordinator's record was not at hand; ``dtype`` is that of the weights."""

    run_id: bytes
    spec: RunSpec
    data: DataManifest
    round: int
    total_tokens: int
    state_digest: str
    log_digest: str
    num_parameters: int
    shards: tuple[ShardState, ...] = ()
    """of each, where the run has several"""
    dtype: str = "float32"
    record: RunRecord | None = None
    evaluations: tuple[SignedEvaluation, ...] = ()
    derived_from: str | None = None
    """manifest digest of the published checkpoint, where this is a set derived from it"""

    @property
    def earlier_evaluations(self) -> tuple[SignedEvaluation, ...]:
        """Of earlier checkpoints, as the record carries them. Raises `VerificationError`."""
        carried = self.record.evaluations if self.record is not None else ()
        return tuple(evaluation.decode(text, self.run_id) for text in carried)


def model_card(facts: CardFacts) -> str:
    """The whole of README.md."""
    from huggingface_hub import ModelCard

    body = "\n\n".join(
        (
            _title(facts),
            _USE,
            _section("Training", _training(facts)),
            _section("Data", _data(facts)),
            _section("Contributors", _contributors(facts.record)),
            _section("Energy", _energy(facts.record)),
            _section("Evaluation", _evaluation(facts)),
            _LIMITS,
            _section("Bias", _bias(facts.evaluations)),
            _section("How to verify", _verifying(facts)),
        )
    )
    return str(ModelCard(f"---\n{_front_matter(facts)}\n---\n\n{body}\n"))


def read_card(text: str) -> dict[str, object]:
    """The front matter of a card, as ``huggingface_hub`` reads it. Raises `DataError`."""
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard(text).data.to_dict())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the model card's front matter cannot be read: {error}") from error


def cell(text: str) -> str:
    """``text`` as a table cell that cannot end the cell, the row or the page's markup."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    for character in "\\|`<>[]*_":
        plain = plain.replace(character, "\\" + character)
    return plain or "-"


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    licence = facts.spec.checkpoints.licence
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_identifier(name),
            dataset_name=name,
            metric_type=_identifier(result.metric),
            metric_name=f"{item.evaluation.metric(result)} ({result.num_fewshot}-shot)",
            metric_value=result.value,
        )
        for item in (*facts.evaluations, *facts.earlier_evaluations)
        if item.evaluation.limit is None  # the Hub shows a trial on a few documents as a score like any other
        for result in item.evaluation.results
        for name in [_dataset_name(facts, item, result)]
    ][:MAX_ROWS]
    base = facts.spec.base.name if facts.spec.base is not None else None
    listed = licence in _LICENCES
    data = ModelCardData(
        # A run's start may be any folder; only what has a Hub id's form is linked.
        base_model=base if base and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", base) else None,
        eval_results=results or None,
        library_name="transformers",
        license=licence if listed else "other",
        license_name=None if listed else _identifier(licence),
        model_name=f"{facts.spec.name} round {facts.round}",
        pipeline_tag="text-generation",
        tags=["swarmtrain", facts.spec.model.family],
        co2_eq_emissions=_emissions(facts.record),
    )
    return str(data.to_yaml(line_break="\n"))


def _dataset_name(facts: CardFacts, item: SignedEvaluation, result: Result) -> str:
    """The task; with the round where it is not this checkpoint that was measured: it must not pass for its score."""
    measured = item.evaluation.round
    return result.task if measured == facts.round else f"{result.task}, measured on round {measured}"


def _emissions(record: RunRecord | None) -> dict[str, object] | None:
    if record is None or not record.energy.devices:
        return None
    return {
        "emissions": round(record.energy.co2_kg * 1000, 3),  # the Hub wants grams
        "source": "estimate with codecarbon's offline factors",
        "training_type": "pre-training",
        "hardware_used": ", ".join(f"{use.num_peers} x {use.device}" for use in record.energy.devices)[:500],
    }


def _identifier(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-") or "unknown"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells that are safe already; those beyond `MAX_ROWS` are counted."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(str(value) for value in row)} |" for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        lines.append(f"| and {len(rows) - MAX_ROWS} more |" + " |" * (len(columns) - 1))
    return "\n".join(lines)


def _title(facts: CardFacts) -> str:
    text = (
        f"# {facts.spec.name}, round {facts.round}\n\n"
        f"A {facts.spec.model.family} language model of {facts.num_parameters:,} parameters that volunteers trained "
        f"together on {facts.total_tokens:,} tokens. Weights: {facts.dtype}"
    )
    # Both published sets share this card.
    text += (
        "; `dtype` in `config.json` is bfloat16 where this is the set that was rounded from them."
        if (facts.derived_from is None)
        else "."
    )
    if facts.derived_from is not None:
        text += f"\nThis set was derived from the published checkpoint with the manifest digest `{facts.derived_from}`."
    return text


def _training(facts: CardFacts) -> str:
    spec = facts.spec
    started = f"random weights, seed {spec.seed}"
    if spec.base is not None:
        started = f"{cell(spec.base.name)}, anchor `{spec.base.anchor_digest}`"
    software = ", ".join(cell(name) for name in facts.record.software) if facts.record else ""
    rows = [
        ("base model", started),
        ("rounds", f"{facts.round:,}"),
        ("tokens", f"{facts.total_tokens:,} of {spec.total_tokens:,} planned"),
        ("sequence length", f"{spec.data.sequence_length}"),
        ("replicas", f"{spec.inner.weights} weights, {spec.inner.optimizer}"),
        ("outer optimizer", f"learning rate {spec.outer.learning_rate:g}, momentum {spec.outer.momentum:g}"),
        ("licence of the weights", cell(spec.checkpoints.licence)),
        ("software", software or "not recorded here"),
    ]
    if facts.record is not None and facts.record.validation_loss is not None:
        rows.append(("validation loss", f"{facts.record.validation_loss:.4f} nats per token"))
    return _table(("what", "value"), rows)


def _data(facts: CardFacts) -> str:
    data = facts.data
    rows = [
        (cell(source.path), cell(source.licence), source.documents, source.text_bytes, f"`{source.digest}`")
        for source in data.sources
    ]
    text = _table(("source", "licence", "documents", "bytes of text", "SHA-256 over its documents"), rows)
    text += (
        f"\n\n{data.train_tokens:,} tokens to train on, {data.validation_tokens:,} held out; data manifest "
        f"`{facts.spec.data.manifest_digest}`, tokenizer `{data.tokenizer_digest}`."
    )
    if data.filters:
        text += " Filters: " + "; ".join(cell(name) for name in data.filters[:MAX_ROWS]) + "."
    return text


def _contributors(record: RunRecord | None) -> str:
    if record is None:
        return "The signed log of the run says who contributed how many tokens."
    text = f"{record.num_peers} peers contributed; the signed log of the run says who how much."
    if not record.contributors:
        return f"{text} Nobody asked to be named."
    rows = [(cell(contributor.name), f"{contributor.tokens:,}") for contributor in record.contributors]
    return f"{text} Named, as they asked:\n\n{_table(('name', 'tokens'), rows)}"


def _energy(record: RunRecord | None) -> str:
    if record is None or not record.energy.devices:
        return "Not recorded: no peer reported a device and a speed."
    energy = record.energy
    rows = [
        (cell(use.device), use.num_peers, f"{use.training_s / 3600:,.2f}", f"{use.watts:g}") for use in energy.devices
    ]
    text = f"{energy.kwh:.3g} kWh, {energy.co2_kg:.3g} kg CO2 equivalent.\n\n"
    text += _table(("device", "peers", "hours of training", "watts"), rows)
    if energy.unknown_tokens:
        text += f"\n\nNot included: peers behind {energy.unknown_tokens:,} tokens, which told no device or speed."
    return f"{text}\n\nMethod: {energy.method}"


def _evaluation(facts: CardFacts) -> str:
    text = "None of this checkpoint is recorded here. `swarm eval FOLDER --tasks leaderboard` makes one."
    if facts.evaluations:
        text = _results(facts.evaluations)
    by_round: dict[int, list[SignedEvaluation]] = {}
    for item in facts.earlier_evaluations:
        by_round.setdefault(item.evaluation.round, []).append(item)
    tables = [
        f"Of the earlier checkpoint of round {number}:\n\n{_results(measured)}" for number, measured in by_round.items()
    ]
    return "\n\n".join([text, *tables])


def _results(evaluations: Sequence[SignedEvaluation]) -> str:
    """What was measured, and by whom; a trial on a few documents only of tasks that nobody measured whole."""
    whole = {
        (result.task, item.evaluation.versions.get("weights"))
        for item in evaluations
        if item.evaluation.limit is None
        for result in item.evaluation.results
    }
    rows = [
        _row(item, result)
        for item in evaluations
        for result in item.evaluation.results
        if item.evaluation.limit is None or (result.task, item.evaluation.versions.get("weights")) not in whole
    ]
    columns = ("task", "metric", "value", "few-shot", "samples", "of all", "lm-evaluation-harness", "measured by")
    return _table(columns, rows)


def _row(item: SignedEvaluation, result: Result) -> tuple[object, ...]:
    limit = item.evaluation.limit
    return (
        cell(result.task),
        cell(item.evaluation.metric(result)),
        f"{result.value:.4g}" + ("" if result.stderr is None else f" ± {result.stderr:.2g}"),
        result.num_fewshot,
        result.num_samples,
        "yes" if limit is None else f"no, {limit} a task at most",
        cell(item.evaluation.versions.get("lm_eval", "-")),
        f"`{peer_id_of(item.signer)}`",
    )


def _bias(evaluations: Sequence[SignedEvaluation]) -> str:
    about_bias = [item for item in evaluations if "bias" in item.evaluation.asked]
    if not about_bias:
        return "Not evaluated yet; `swarm eval FOLDER --tasks bias` does (CrowS-Pairs, BBQ, Winogender, ToxiGen)."
    return _results(about_bias)


def _verifying(facts: CardFacts) -> str:
    run_id = facts.run_id.hex()
    rows = [
        ("run id", f"`{run_id}`"),
        ("organizer's key", f"`{facts.spec.organizer_key}`"),
        ("state digest (anchor and outer momentum)", f"`{facts.state_digest}`"),
        ("log digest", f"`{facts.log_digest}`"),
        *(
            (f"state and log digest of shard {number}", f"`{state.state_digest}` `{state.log_digest}`")
            for number, state in enumerate(facts.shards)
        ),
        ("data manifest", f"`{facts.spec.data.manifest_digest}`"),
    ]
    table = _table(("what", "value"), rows)
    if facts.derived_from is not None:
        return (
            f"{table}\n\nThis folder was made from a published checkpoint and is not signed by the run: verify that "
            "one, and derive this set again (`swarm export`); `origin.json` names both."
        )
    return (
        f"{table}\n\n`swarm verify FOLDER --run {run_id}` checks every file of this folder, offline, against the "
        "manifest that\nthe run's publication key signed, and that key against the run spec that the organizer signed."
    )


_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Intended for research on language models and on training them together: reading, comparing, continuing to train. It is
a pretrained model: it continues text. It was not tuned to follow instructions or to refuse anything."""

_LIMITS = """\
## Known risks

- It repeats what its data says, false, biased or offensive as that may be, and may repeat parts of it word for word.
- Volunteers trained it. Contributions are clipped, judged and signed for, but one that is close to what is honest, and
  slanted, is not detected; a backdoor of this kind cannot be excluded.
- Do not use it where people are judged, advised or put at risk by what it writes, nor without tests of your own."""
