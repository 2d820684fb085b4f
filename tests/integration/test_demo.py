"""The demo's judgement: it claims what was seen, and nothing else. The demo itself is `scripts/demo`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import demo_figures as demo

DIGESTS = ("aa", "bb")


def commit(round_number: int, *, counted: bool = True, digest: str = "", event: str = "commit") -> dict[str, Any]:
    return {
        "event": event,
        "round": round_number,
        "committed tokens": 100 * round_number,
        "my tokens": 60 * round_number,
        "tokens/s": 10,
        "counted": counted,
        "state digest": digest or DIGESTS[round_number - 1],
        "sent bytes": 1000,
        "at_s": float(round_number),
    }


def volunteer(name: str, *commits: dict[str, Any], exit_code: int = 0) -> demo.Volunteer:
    return demo.Volunteer(
        name=name, news=[{"event": "joining", "peer id": f"id-{name}", "at_s": 0.0}, *commits], exit_code=exit_code
    )


def evidence() -> demo.Evidence:
    """Two rounds: ben is killed in the second, dora joins for it."""
    shares = [{"id-anna": 60, "id-ben": 40}, {"id-anna": 60, "id-dora": 40}]
    rounds = [
        {"round": n, "tokens": 100 * n, "validation loss": 7.0 - 2 * n, "absent parts": 0, "shares": shares[n - 1]}
        for n in (1, 2)
    ]
    return demo.Evidence(
        status={"initial validation loss": 7.0, "total tokens": 200, "rounds": rounds},
        checkpoint={
            **{"ok": True, "round": 2, "total_tokens": 200, "state_digest": "bb", "manifest_digest": "cc"},
            **{"size_bytes": 2_000_000, "num_files": 6, "folder": "checkpoints/round-000002"},
        },
        opened="LlamaForCausalLM 10 parameters",
        volunteers=[
            volunteer("anna", commit(1), commit(2)),
            volunteer("ben", commit(1), exit_code=-9),
            volunteer("dora", commit(2)),
        ],
        seed_news=[commit(n, event="seed commit", counted=False) for n in (1, 2)],
        victim="ben",
        killed_at_round=2,
        latecomer="dora",
        left_behind=[],
    )


def with_news(name: str, *commits: dict[str, Any], exit_code: int = 0) -> Callable[[demo.Evidence], demo.Evidence]:
    changed = volunteer(name, *commits, exit_code=exit_code)
    return lambda e: replace(e, volunteers=[changed if v.name == name else v for v in e.volunteers])


def with_loss(value: float | None) -> Callable[[demo.Evidence], demo.Evidence]:
    def change(e: demo.Evidence) -> demo.Evidence:
        rounds = [{**round_, "validation loss": value} for round_ in e.status["rounds"]]
        return replace(e, status={**e.status, "rounds": rounds})

    return change


def with_checkpoint(**values: Any) -> Callable[[demo.Evidence], demo.Evidence]:
    return lambda e: replace(e, checkpoint={**e.checkpoint, **values})


def test_every_claim_holds_where_everything_went_well() -> None:
    assert [claim.text for claim in demo.claims(evidence()) if not claim.holds] == []


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        pytest.param(with_loss(6.5), "validation loss", id="the loss fell a little"),
        pytest.param(with_loss(None), "validation loss", id="nobody measured the loss"),
        pytest.param(with_news("anna", commit(1, digest="xx"), commit(2)), "equal state", id="unequal in the middle"),
        pytest.param(with_news("dora", commit(2, digest="xx")), "equal state", id="unequal at the end"),
        pytest.param(with_news("anna", commit(1)), "equal state", id="a survivor lacks the last round"),
        pytest.param(lambda e: replace(e, seed_news=[]), "equal state", id="the seed peer said nothing"),
        pytest.param(lambda e: replace(e, left_behind=["process 7"]), "left nothing", id="a process is left"),
        pytest.param(lambda e: replace(e, killed_at_round=0), "left nothing", id="nobody was killed"),
        pytest.param(with_news("dora", commit(2, counted=False)), "joined late", id="never counted"),
        pytest.param(with_news("anna", commit(1), commit(2), exit_code=70), "by themselves", id="one crashed"),
        pytest.param(with_checkpoint(ok=False), "download", id="not verified"),
        pytest.param(with_checkpoint(state_digest="xx"), "download", id="of another state"),
        pytest.param(with_checkpoint(round=1), "download", id="not of the last round"),
        pytest.param(lambda e: replace(e, opened=""), "transformers", id="not opened"),
    ],
)
def test_a_claim_fails_where_its_evidence_is_missing(
    change: Callable[[demo.Evidence], demo.Evidence], claim: str
) -> None:
    failed = [told.text for told in demo.claims(change(evidence())) if not told.holds]
    assert failed and claim in failed[0]


def test_the_tables_show_every_round_and_volunteer() -> None:
    rounds, volunteers, checkpoint = demo.tables(evidence())
    assert rounds[2] == [
        (0, 0, "7.000", "", "", "", ""),
        (1, "100", "5.000", "", "60", "40", ""),
        (2, "200", "3.000", "", "60", "", "40"),
    ]
    assert [(row[0], row[3], row[4], row[5]) for row in volunteers[2]] == [
        ("anna", "finished", 2, "120"),
        ("ben", "killed in round 2", 1, "40"),
        ("dora", "finished", 1, "40"),
    ]
    assert ("state digest", "bb") in checkpoint[2]
    assert all(len(row) == len(table[1]) for table in (rounds, volunteers, checkpoint) for row in table[2])


def in_two_shards(second: str = "dd") -> demo.Evidence:
    """Anna holds both shards, ben the first, dora the second, whose state after the last round is ``second``."""
    base, rounds = evidence(), (1, 2)
    of_first = [{**commit(n), "shard": 0} for n in rounds]
    of_second = [{**commit(n, digest="dd"), "shard": 1} for n in rounds]
    held = {"anna": ([0, 1], [*of_first, *of_second]), "ben": ([0], of_first[:1]), "dora": ([1], of_second)}
    volunteers = [
        volunteer(v.name, {"event": "ready", "round": 0, "at_s": 0.0, "hosts": hosts}, *commits, exit_code=v.exit_code)
        for v, (hosts, commits) in zip(base.volunteers, held.values(), strict=True)
    ]
    seed_news = [{**c, "event": "seed commit"} for c in [*of_first, *of_second]]
    checkpoint = {
        **base.checkpoint,
        "state_digest": "over",
        "shards": [{"state_digest": "bb"}, {"state_digest": second}],
    }
    return replace(base, volunteers=volunteers, seed_news=seed_news, checkpoint=checkpoint)


def test_of_two_shards_each_is_compared_among_those_who_hold_it() -> None:
    assert [claim.text for claim in demo.claims(in_two_shards()) if not claim.holds] == []
    failed = [claim.text for claim in demo.claims(in_two_shards("xx")) if not claim.holds]
    assert len(failed) == 1 and "download" in failed[0]
    _, (_, columns, rows), _ = demo.tables(in_two_shards())
    assert [row[columns.index("shards")] for row in rows] == ["0, 1", "0", "1"]


def test_pending_tokens_are_those_trained_and_not_committed() -> None:
    """The newest news of each volunteer, and its pace since then."""
    assert demo.pending_tokens([[commit(1), commit(2)], [commit(2)], []], now_s=2.0) == 120 + 120 - 200
    assert demo.pending_tokens([[commit(2)]], now_s=5.0) == 120 + 30 - 200
    assert demo.pending_tokens([[]], now_s=5.0) == 0


def test_tokens_that_entered_at_a_later_shard_are_not_counted_twice() -> None:
    """A third of what the peer with both shards trained passed the first one at another peer, which counts it."""
    both, first = {**commit(2), "first shard tokens": 80}, {**commit(2), "first shard tokens": 120}
    assert demo.pending_tokens([[both], [first]], now_s=2.0) == 80 + 120 - 200
    assert demo.pending_tokens([[both]], now_s=5.0) == 80 + 20 - 200


def test_tokens_per_second_are_measured_over_commits() -> None:
    assert demo.tokens_per_s(evidence()) == 100.0
    assert demo.tokens_per_s(replace(evidence(), volunteers=[])) == 0.0


def test_figures_are_json_of_what_the_tables_say() -> None:
    values = demo.figures(evidence())
    assert values["validation_losses"] == [7.0, 5.0, 3.0]
    assert values["volunteers"]["anna"] == {"tokens_counted": 120, "tokens_per_s": 60, "bytes_sent": 1000}
    assert all(values["claims"].values())


def test_the_demo_is_one_of_the_scripts() -> None:
    script = Path(__file__).parents[2] / "scripts" / "demo"
    assert script.stat().st_mode & 0o111
    assert "scripts/setup" in script.read_text()
