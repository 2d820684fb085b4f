"""`swarm eval`: the real harness on tasks made from local text, offline, and a signed record of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peer.checkpoints import harness
from peer.checkpoints.facts import read_facts
from peer.checkpoints.generate import open_checkpoint
from peer.checkpoints.harness import SETS, EvalOptions, collect, plan_tasks, refuse_unknown
from peer.checkpoints.verify import verify_folder
from swarm.errors import ConfigError, DataError
from tests.published_samples import TEXT, Published, publish

ROOT = Path(__file__).parents[2]

TASKS = {
    "likeliest": """
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
""",
    "written": """
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{text}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
""",
}
DOCUMENTS = [
    {"start": "The quick brown", "choices": [" fox", " dog"], "answer": 0, "text": TEXT * 3},
    {"start": "jumps over the", "choices": [" lazy", " fox"], "answer": 0, "text": TEXT},
]


def write_tasks(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "documents.json").write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    paths = []
    for name, text in TASKS.items():
        path = folder / f"{name}.yaml"
        data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'documents.json'}\n"
        path.write_text(f"task: local_{name}\n{data}test_split: test\n{text}")
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published") / "c", "llama")


@pytest.fixture(scope="module")
def measured(published: Published, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A copy of the checkpoint, and what the command printed about it; one process, without network."""
    base = tmp_path_factory.mktemp("eval")
    folder = Path(shutil.copytree(published.made.folder, base / "c"))
    arguments = ["eval", str(folder), "--tasks", ",".join(write_tasks(base / "tasks")), "--home", str(base / "home")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(base / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "swarm.cli.main", *arguments, "--device", "cpu", "--batch-size", "2", "--json"],
        env=environment,
        cwd=base,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def test_the_harness_measures_local_tasks_offline(measured: tuple[Path, dict[str, Any]]) -> None:
    results = {(result["task"], result["metric"]): result for result in measured[1]["results"]}
    assert set(results) == {
        ("local_likeliest", "acc"),
        ("local_whole_text", "byte_perplexity"),
        ("local_written", "exact_match"),
    }
    assert all(result["num_samples"] == 2 for result in results.values())
    # 300 tokens of a random model: every byte costs about the log of the vocabulary over its tokens.
    assert 1 < results["local_whole_text", "byte_perplexity"]["value"] < 300
    assert measured[1]["versions"]["lm_eval"].startswith("0.4.")
    assert measured[1]["asked"] == ["likeliest", "whole_text", "written"]


def test_the_signed_record_lies_beside_the_checkpoint_which_still_verifies(
    measured: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = measured
    report = verify_folder(folder, None)
    assert (report.ok, report.warnings) == (True, ())
    facts = read_facts(folder, None)
    assert [item.signer.hex() for item in facts.evaluations] == [told["signer"]]
    assert len(facts.card.evaluations[0].evaluation.results) == 3
    assert Path(told["path"]).read_bytes() == facts.card.evaluations[0].evaluation.canonical_bytes()


@contextmanager
def silent(total: int, unit: str, what: str) -> Any:
    yield lambda amount: None


@pytest.fixture(scope="module")
def model(published: Published) -> Any:
    from peer.checkpoints.harness_model import CheckpointModel

    return CheckpointModel(*open_checkpoint(published.made.folder), 3, silent)


def log_probability(model: Any, context: list[int], continuation: list[int]) -> float:
    """The plain way: one sequence, no batch."""
    ids = context + continuation
    with torch.inference_mode():
        log_TV = torch.log_softmax(model._model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    return sum(float(log_TV[place - 1, ids[place]]) for place in range(len(context), len(ids)))


def test_likelihoods_in_batches_equal_those_of_one_sequence_at_a_time(model: Any) -> None:
    pairs = [("The quick", " brown fox"), ("jumps", " over"), ("The", " lazy dog. Zwölf"), ("", "Deich"), ("x ", "y")]
    found = model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        ids = model.tok_encode(context + continuation)
        head = model.tok_encode(stripped) if stripped else [model.prefix_token_id]
        tail = ids[len(head) :] if stripped else ids
        assert value == pytest.approx(log_probability(model, head, tail), abs=1e-4)


def test_a_continuation_counts_as_greedy_only_where_every_token_is_the_likeliest(model: Any) -> None:
    with torch.inference_mode():
        best = int(model._model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].argmax())
    scores = model._loglikelihood_tokens([(("", ""), [5, 6], [best]), (("", ""), [5, 6], [(best + 1) % 300])])
    assert [greedy for _, greedy in scores] == [True, False]


def test_a_text_longer_than_the_context_is_predicted_token_by_token_once(model: Any) -> None:
    ids = model.tok_encode(TEXT * 2)
    assert model.max_length < len(ids)
    (value,) = model.loglikelihood_rolling([SimpleNamespace(args=(TEXT * 2,))])
    first = log_probability(model, [model.prefix_token_id], ids[: model.max_length])
    rest = len(ids) - model.max_length
    tail = log_probability(model, ids[-model.max_length - 1 : -rest], ids[-rest:])
    assert value == pytest.approx(first + tail, rel=1e-4)


def test_generated_text_ends_before_the_first_stop(model: Any) -> None:
    (whole,) = model.generate_until([SimpleNamespace(args=("The quick", {"until": [], "max_gen_toks": 8}))])
    stop = whole[3]
    (cut,) = model.generate_until([SimpleNamespace(args=("The quick", {"until": [stop], "max_gen_toks": 8}))])
    assert cut == whole.split(stop)[0]


def test_a_task_that_leaves_no_room_for_its_question_is_refused_by_name(model: Any) -> None:
    asked = SimpleNamespace(args=("The quick", {"max_gen_toks": model.max_length}), task_name="long_answers")
    with pytest.raises(
        DataError, match=rf"long_answers wants up to {model.max_length} tokens .* {model.max_length} in"
    ):
        model.generate_until([asked])
    text = model.generate_until([SimpleNamespace(args=("The quick", {"max_gen_toks": model.max_length - 1}))])
    assert len(text) == 1


def test_the_named_sets_are_names_of_the_harness() -> None:
    """Only the folders of these tasks are indexed: all of the harness's take a minute on a busy machine."""
    import lm_eval.tasks

    ours = (
        "leaderboard",
        "glue",
        "super_glue",
        "crows_pairs",
        "bbq",
        "winogender",
        "toxigen",
        "simple_cooccurrence_bias",
    )
    folders = [str(Path(lm_eval.tasks.__file__).parent / name) for name in ours]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    refuse_unknown([name for names in SETS.values() for name in names], {*manager.all_tasks, *manager.all_groups})
    tags = {name: manager.task_index[name].tags for name in manager.all_tasks}
    assert {name for name, found in tags.items() if "glue" in found} <= set(SETS["glue"])
    assert {name for name, found in tags.items() if "super-glue-lm-eval-v1" in found} == set(SETS["superglue"])


def test_an_unknown_task_is_told_with_the_near_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
        refuse_unknown(["helaswag"], {"hellaswag", "arc_easy"})


def test_sets_are_expanded_and_files_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('# task: no\ntask: "mine"  # a comment\n')
    plan = plan_tasks(["glue", "rte", str(tmp_path / "a.yaml")])
    assert plan.names == (*SETS["glue"], "mine")
    assert (plan.folders, plan.only_local) == ((tmp_path,), False)


@pytest.mark.parametrize("text", ["", "tasks: a", "task:\n  - a\n", "task: ../x"])
def test_a_file_that_names_no_task_is_a_data_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match="names no task"):
        plan_tasks([str(tmp_path / "a.yaml")])
    with pytest.raises(DataError, match="cannot be read"):
        plan_tasks([str(tmp_path / "b.yaml")])


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"seed": -1}, {"batch_size": 0}, {"num_fewshot": -1}, {"tasks": ()}], ids=str
)
def test_options_out_of_range_are_config_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EvalOptions(**{"tasks": ("glue",), **options})


def test_what_is_no_finite_number_is_no_result() -> None:
    found = {
        "results": {"a": {"alias": "a", "sample_len": 3, "acc,none": "N/A", "f1,none": float("nan"), "em,strict": 0.5}}
    }
    (result,) = collect(found)
    assert (result.metric, result.value, result.stderr) == ("em (strict)", 0.5, None)
    with pytest.raises(DataError, match="measured nothing"):
        collect({"results": {"a": {"acc,none": None}}})


def test_the_versions_of_what_measured_are_recorded() -> None:
    assert {"lm_eval", "torch", "transformers"} <= set(harness._versions())
