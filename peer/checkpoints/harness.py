"""Evaluating a checkpoint with lm-evaluation-harness: which tasks, which seeds, and what of it is recorded.

Decides what the named sets mean, in the harness's own names; a door to ``lm_eval``. A local task file is found by its
path and works offline; it may name code beside it, which then runs: it is the person's own. Leaves the model to
`peer.checkpoints.harness_model`, the record's form to `swarm.evaluation`, and signing to the caller.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.checkpoints.facts import manifest_digest
from peer.checkpoints.generate import open_checkpoint
from peer.checkpoints.sets import held_set
from peer.checkpoints.verify import Provenance
from peer.training.device import choose, describe
from swarm.errors import ConfigError, DataError, SwarmError
from swarm.evaluation import Evaluation, Result
from swarm.manifest import FP32

if TYPE_CHECKING:
    from peer.checkpoints.harness_model import OnProgress

SETS: dict[str, tuple[str, ...]] = {
    "leaderboard": ("leaderboard",),
    "glue": ("cola", "mnli", "mnli_mismatch", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli"),
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"),
    "bias": ("crows_pairs_english", "bbq", "winogender_all", "toxigen", "simple_cooccurrence_bias"),
}
MAX_TASK_FILE_BYTES = 1 << 20
_PACKAGES = ("swarmtrain", "lm_eval", "transformers", "torch", "tokenizers", "datasets")
_NO_METRICS = ("alias", "name", "sample_len", "sample_count")  # what the harness puts among the metrics
_LABEL_REFUSED = re.compile(r"[\x00-\x1f\x7f|`<>]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """``tasks``: names of sets, of the harness, or paths of local task files. ``limit``: documents a task at most."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 1234
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("num-fewshot", self.num_fewshot, 0, 1000),
            ("limit", self.limit, 1, 10**9),
            ("batch-size", self.batch_size, 1, 65536),
            ("seed", self.seed, 0, 2**32 - 1),
        ):
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, not {value}")
        if not self.tasks:
            raise ConfigError("no task is named", f"name tasks, or a set: {', '.join(SETS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """``names``: what the harness is asked for; ``folders``: where it finds local tasks beside its own."""

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    only_local: bool


def plan_tasks(tasks: Sequence[str]) -> TaskPlan:
    """Sets expanded, files looked into, doubles removed. Raises `DataError` for a file that names no task."""
    names: list[str] = []
    folders: list[Path] = []
    num_local = 0
    for task in tasks:
        path = Path(task)
        if path.suffix in (".yaml", ".yml"):
            names.append(_task_name(path))
            folders.append(path.resolve().parent)
            num_local += 1
        else:
            names += SETS.get(task, (task,))
    return TaskPlan(
        names=tuple(dict.fromkeys(names)),
        folders=tuple(dict.fromkeys(folders)),
        only_local=num_local == len(tasks),
    )


def evaluate(folder: Path, provenance: Provenance, options: EvalOptions, on_progress: OnProgress) -> Evaluation:
    """Run the harness on the verified checkpoint in ``folder``.

    Raises `ConfigError` for unknown tasks or without the package, `DataError` where a task's data cannot be had or
    nothing was measured.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from peer.checkpoints.harness_model import CheckpointModel
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is not there: {error}", "pip install 'swarmtrain[eval]'") from error
    plan = plan_tasks(options.tasks)
    manager = TaskManager(
        include_path=[str(path) for path in plan.folders] or None, include_defaults=not plan.only_local
    )
    refuse_unknown(plan.names, {*manager.all_tasks, *manager.all_groups, *manager.all_tags})
    device = choose(options.device)
    model, tokenizer = open_checkpoint(folder)
    dtype = held_set(folder, provenance.manifest).dtype
    asked = CheckpointModel(model.to(device), tokenizer, options.batch_size, on_progress)
    try:
        found = lm_eval.simple_evaluate(
            model=asked,
            tasks=list(plan.names),
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except SwarmError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"the harness could not run {', '.join(plan.names)[:200]}: {reason}",
            "see whether the task's data can be had (most come from the Hugging Face Hub)",
        ) from error
    return Evaluation(
        run_id=provenance.run_id.hex(),
        round=provenance.manifest.round,
        manifest_digest=manifest_digest(provenance),
        asked=tuple(_label(Path(task).stem if task.endswith((".yaml", ".yml")) else task) for task in options.tasks),
        results=collect(found or {}),
        versions=_versions() | ({} if dtype == FP32 else {"weights": dtype}),
        seed=options.seed,
        limit=options.limit,
        batch_size=options.batch_size,
        device=_label(describe(device)),
    )


def refuse_unknown(names: Sequence[str], known: set[str]) -> None:
    """Raise `ConfigError` with the near name where the harness knows no task, group or tag of a name."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(
                f"lm-evaluation-harness knows no task {name[:80]!r}{hint}",
                f"name a task of the harness, a task file, or a set: {', '.join(SETS)}",
            )


def collect(found: Mapping[str, Any]) -> tuple[Result, ...]:
    """Every metric that is a finite number, by task. Raises `DataError` where there is none."""
    results = []
    for task, metrics in found.get("results", {}).items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if name in _NO_METRICS or name.endswith("_stderr") or not _is_number(value):
                continue
            stderr = metrics.get(f"{name}_stderr,{kind}")
            shots = found.get("n-shot", {}).get(task, 0)
            results.append(
                Result(
                    task=_label(task),
                    metric=_label(name if kind in ("", "none") else f"{name} ({kind})"),
                    value=float(value),
                    stderr=float(stderr) if _is_number(stderr) else None,
                    num_fewshot=shots if isinstance(shots, int) else 0,
                    num_samples=int(found.get("n-samples", {}).get(task, {}).get("effective", 0)),
                    task_version=_label(str(found.get("versions", {}).get(task, "0"))),
                )
            )
    if not results:
        raise DataError("the harness measured nothing", "raise --limit, or choose other tasks")
    return tuple(results)


def _is_number(value: object) -> bool:
    try:
        return not isinstance(value, (str, bool)) and math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _task_name(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")[:MAX_TASK_FILE_BYTES]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the task file {path} cannot be read: {error}", "name a YAML file of the harness") from error
    found = re.search(r"^(?:task|group):[ \t]*[\"']?([A-Za-z0-9_.-]+)[\"']?[ \t]*(?:#.*)?$", text, re.MULTILINE)
    if found is None:
        raise DataError(f"{path} names no task", "it needs a line `task: NAME`")
    return found[1]


def _label(text: str) -> str:
    return _LABEL_REFUSED.sub(" ", text)[:128] or "-"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = _label(version(package))
        except PackageNotFoundError:
            continue
    return found
