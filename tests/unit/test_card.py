"""The model card: huggingface_hub reads it, every figure is there, and no text from outside breaks out of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from peer.checkpoints.card import CardFacts, model_card, read_card
from swarm import energy, run_record
from swarm.energy import PeerWork, estimate, watts_of
from swarm.errors import DataError, VerificationError
from swarm.evaluation import Evaluation, Result, SignedEvaluation
from swarm.identity import Identity
from swarm.run_record import Contributor, RunRecord
from tests.checkpoint_samples import data_manifest, make_spec

WORK = (
    PeerWork(tokens=7_200_000, device="CPU, 2 threads", tokens_per_s=1000.0),
    PeerWork(tokens=3_600_000, device="CPU, 2 threads", tokens_per_s=1000.0),
    PeerWork(tokens=5_000, device="", tokens_per_s=0.0),
)
RECORD = RunRecord(
    round=10,
    num_peers=3,
    contributors=(Contributor(name="Ada *Lovelace*", tokens=7_200_000),),
    software=("swarmtrain/0.1.0",),
    validation_loss=2.5,
    energy=estimate(WORK),
)


def facts(**changes: object) -> CardFacts:
    data = data_manifest()
    spec = make_spec(data)
    plain = CardFacts(
        run_id=spec.run_id,
        spec=spec,
        data=data,
        round=10,
        total_tokens=500,
        state_digest="5" * 64,
        log_digest="6" * 64,
        num_parameters=1234,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


SIGNER = Identity(b"e" * 32)


def evaluation(asked: str = "tiny", value: float = 0.25, limit: int | None = None) -> SignedEvaluation:
    made = Evaluation(
        run_id=make_spec(data_manifest()).run_id.hex(),
        round=10,
        manifest_digest="a" * 64,
        asked=(asked,),
        results=(Result(task=f"{asked}_task", metric="acc", value=value, stderr=0.01, num_samples=40),),
        versions={"lm_eval": "0.4.13"},
        seed=1,
        limit=limit,
        batch_size=8,
        device="cpu",
    )
    return SignedEvaluation(name=made.name, evaluation=made, signer=SIGNER.public_key)


def test_huggingface_hub_reads_the_card_and_its_evaluation() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(facts(record=RECORD, evaluations=(evaluation(),)))).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "unknown")
    (result,) = data.eval_results or []
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("tiny_task", "acc", 0.25)
    assert data.co2_eq_emissions["emissions"] == pytest.approx(11.4)


def test_a_trial_on_a_few_documents_is_no_score_of_the_card() -> None:
    """It is marked in the table where nobody measured the task whole, and nowhere in the front matter."""
    trials = (evaluation("tiny", 0.75, limit=3), evaluation("other", 0.875, limit=5))
    card = model_card(facts(evaluations=(*trials, evaluation("tiny", 0.25))))
    results = read_card(card)["model-index"][0]["results"]  # type: ignore[index]
    assert [result["metrics"][0]["value"] for result in results] == [0.25]
    assert "0.75" not in card
    (row,) = [line for line in card.splitlines() if "0.875" in line]
    assert "no, 5 a task at most" in row and SIGNER.peer_id in row
    assert "model-index" not in read_card(model_card(facts(evaluations=trials)))


def test_a_score_of_the_rounded_set_says_so_in_the_table_and_in_the_front_matter() -> None:
    measured = evaluation("tiny", 0.75)
    rounded = replace(measured, evaluation=measured.evaluation.model_copy(update={"versions": {"weights": "bf16"}}))
    trial = evaluation("tiny", 0.5, limit=3)
    made = model_card(facts(evaluations=(rounded, trial)))
    assert "| acc, bf16 | 0.75" in made
    assert "| acc | 0.5 " in made, "a whole result of another set hides no trial"
    results = read_card(made)["model-index"][0]["results"]  # type: ignore[index]
    assert [metric["name"] for result in results for metric in result["metrics"]] == ["acc, bf16 (0-shot)"]


def test_every_section_and_figure_is_on_the_card() -> None:
    card = model_card(facts(record=RECORD, evaluations=(evaluation("bias"),)))
    sections = ("Use", "Training", "Data", "Contributors", "Energy", "Evaluation", "Known risks", "Bias")
    for section in (*sections, "How to verify"):
        assert f"\n## {section}\n" in card
    for figure in (
        "1,234 parameters",
        "Ada \\*Lovelace\\*",
        "7,200,000",
        "swarmtrain/0.1.0",
        "0.024 kWh",
        "3.00",
        "0.25",
    ):
        assert figure in card, figure
    assert "5,000 tokens" in card  # whose energy is unknown
    assert "Not evaluated yet" not in card
    assert "Not evaluated yet" in model_card(facts(evaluations=(evaluation("leaderboard"),)))


def test_the_same_facts_make_the_same_card() -> None:
    assert model_card(facts(record=RECORD)) == model_card(facts(record=RECORD))


def test_a_licence_that_the_hub_does_not_list_is_other_with_its_name() -> None:
    spec = make_spec(data_manifest())

    def front(licence: str) -> dict[str, object]:
        section = spec.checkpoints.model_copy(update={"licence": licence})
        return read_card(model_card(facts(spec=spec.model_copy(update={"checkpoints": section}))))

    assert front("apache-2.0")["license"] == "apache-2.0"
    assert (front("My-Own-1.0")["license"], front("My-Own-1.0")["license_name"]) == ("other", "my-own-1.0")


def test_a_card_without_a_record_says_that_nothing_is_recorded() -> None:
    card = model_card(facts())
    assert "Not recorded" in card
    assert "co2_eq_emissions" not in read_card(card)


def test_front_matter_that_is_no_table_is_a_data_error() -> None:
    with pytest.raises(DataError):
        read_card("---\n- 1\n---\n")


def test_the_factors_are_those_that_codecarbon_has_for_offline_use() -> None:
    spec = importlib.util.find_spec("codecarbon")  # its files alone: importing it takes seconds
    assert spec is not None and spec.origin is not None
    files = Path(spec.origin).parent
    sources = json.loads((files / "data/private_infra/carbon_intensity_per_source.json").read_text())
    assert sources["world_average"] == energy.CO2_G_PER_KWH
    assert f"DEFAULT_POWER_PER_CORE = {energy.WATTS_PER_CPU_THREAD:g}\n" in (files / "core/cpu.py").read_text()
    assert f"POWER_CONSTANT = {energy.DEFAULT_CPU_WATTS:g}\n" in (files / "external/hardware.py").read_text()


@pytest.mark.parametrize(
    ("device", "watts"),
    [
        ("CPU, 1 thread", 4.0),
        ("CPU, 16 threads", 64.0),
        ("CPU", 85.0),
        ("NVIDIA H200, 139 GiB", 700.0),
        ("NVIDIA A100-SXM4-80GB, 79 GiB", 400.0),
        ("NVIDIA A10, 22 GiB", 150.0),
        ("NVIDIA L40S, 44 GiB", 300.0),
        ("Apple MPS", 60.0),
        ("something new", energy.UNKNOWN_GPU_WATTS),
    ],
)
def test_power_follows_from_the_name_of_the_device(device: str, watts: float) -> None:
    assert watts_of(device) == watts


def test_energy_is_seconds_times_watts_whatever_the_order_of_peers() -> None:
    found = estimate(WORK)
    assert found == estimate(reversed(WORK))
    (use,) = found.devices
    assert (use.num_peers, use.training_s, use.watts) == (2, 10_800.0, 8.0)
    assert (found.kwh, found.co2_kg, found.unknown_tokens) == (0.024, 0.0114, 5_000)


@pytest.mark.parametrize("rate", [1e-300, 1e-200, 0.9, 0.0, -1.0, float("nan")])
def test_tokens_of_a_rate_that_nobody_can_believe_have_no_known_energy(rate: float) -> None:
    found = estimate([*WORK, PeerWork(tokens=100_000_000, device="CPU, 1 thread", tokens_per_s=rate)])
    assert found.devices == estimate(WORK).devices and found.kwh == estimate(WORK).kwh
    assert found.unknown_tokens == 100_005_000


def test_a_record_is_read_back_and_bad_ones_are_refused() -> None:
    raw = RECORD.canonical_bytes()
    assert run_record.parse(raw) == RECORD
    for bad in (b"{", b"[]", raw.replace(b"Ada", b"A|da"), raw + b" " * run_record.MAX_RECORD_BYTES):
        with pytest.raises(VerificationError):
            run_record.parse(bad)
