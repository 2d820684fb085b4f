"""What the demo shows, in figures: pure functions from what programs said to tables, claims and JSON.

Decides what counts as shown. Leaves running things to `demo_stage`, the story to `demo_run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A fall of the validation loss that neither noise nor a lucky batch makes.
CLEAR_FALL = 0.8
Table = tuple[str, Sequence[str], list[Sequence[object]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Volunteer:
    """``news``: what its `swarm join --json` said, each with the time ``at_s`` at which it was heard."""

    name: str
    news: list[dict[str, Any]]
    exit_code: int | None

    @property
    def peer_id(self) -> str:
        return str(next((news["peer id"] for news in self.news if news["event"] == "joining"), ""))

    @property
    def totals(self) -> dict[str, Any]:
        """The newest news that counts tokens and bytes: the last words of a killed one are from before."""
        return next((news for news in reversed(self.news) if "sent bytes" in news), {})

    @property
    def commits(self) -> list[dict[str, Any]]:
        return [news for news in self.news if news["event"] == "commit"]

    @property
    def hosts(self) -> list[int]:
        """The shards that it hosts; of one, where it never got ready."""
        return next((list(news["hosts"]) for news in self.news if news["event"] == "ready" and "hosts" in news), [0])

    def mean_tokens_per_s(self) -> float:
        """Tokens trained over time, from the first progress on."""
        told = [news for news in self.news if "my tokens" in news]
        if len(told) < 2 or told[-1]["at_s"] <= told[0]["at_s"]:
            return 0.0
        return float((told[-1]["my tokens"] - told[0]["my tokens"]) / (told[-1]["at_s"] - told[0]["at_s"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that was seen. ``status``, ``checkpoint``: what `swarm status` and `swarm verify` print as JSON."""

    status: dict[str, Any]
    checkpoint: dict[str, Any]
    opened: str
    """what a process without our code said of the model"""
    volunteers: list[Volunteer]
    seed_news: list[dict[str, Any]]
    victim: str
    killed_at_round: int
    latecomer: str
    left_behind: list[str]


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    holds: bool


def committed_tokens(commits: Sequence[dict[str, Any]]) -> list[int]:
    """Committed tokens after each round, from the start."""
    return [0, *(commit["committed tokens"] for commit in commits)]


def first_shard_tokens(news: dict[str, Any]) -> int:
    """Tokens that passed the first shard that its teller hosts: what entered later passed another's before."""
    return int(news.get("first shard tokens", news["my tokens"]))


def first_shard_tokens_per_s(news: dict[str, Any]) -> float:
    return float(news["tokens/s"] * first_shard_tokens(news) / max(news["my tokens"], 1))


def pending_tokens(news_of_all: Sequence[Sequence[dict[str, Any]]], now_s: float) -> int:
    """Tokens that volunteers trained and that no commit has counted yet: by their newest news, and their pace since."""
    newest = [next((n for n in reversed(news) if "my tokens" in n), None) for news in news_of_all]
    told = [news for news in newest if news is not None]
    if not told:
        return 0
    trained = sum(first_shard_tokens(news) + first_shard_tokens_per_s(news) * (now_s - news["at_s"]) for news in told)
    return int(trained - max(news["committed tokens"] for news in told))


def digests_by_round(evidence: Evidence) -> dict[tuple[int, int], dict[str, str]]:
    """(round, shard) -> replica -> the state digest that it computed from its own memory after that round."""
    digests: dict[tuple[int, int], dict[str, str]] = {}
    told = [(volunteer.name, volunteer.commits) for volunteer in evidence.volunteers]
    told.append(("seed", [news for news in evidence.seed_news if news["event"] == "seed commit"]))
    for name, commits in told:
        for commit in commits:
            digests.setdefault((commit["round"], _shard(commit)), {})[name] = commit["state digest"]
    return digests


def _shard(commit: dict[str, Any]) -> int:
    return int(commit.get("shard", 0))


def losses(evidence: Evidence) -> list[float]:
    """Validation losses in the order of rounds, the untrained model's first."""
    measured = [round_["validation loss"] for round_ in evidence.status["rounds"]]
    return [loss for loss in (evidence.status["initial validation loss"], *measured) if loss is not None]


def claims(evidence: Evidence) -> list[Claim]:
    """What the demo says it shows, and whether it did."""
    measured, digests = losses(evidence), digests_by_round(evidence)
    last_round = max((number for number, _ in digests), default=0)
    states = [shard["state_digest"] for shard in evidence.checkpoint.get("shards", ())]
    states = states or [evidence.checkpoint["state_digest"]]
    final = [digests.get((last_round, shard), {}) for shard in range(len(states))]
    survivors = [
        {v.name for v in evidence.volunteers if v.name != evidence.victim and shard in v.hosts} | {"seed"}
        for shard in range(len(states))
    ]
    unequal = [number for (number, _), told in sorted(digests.items()) if len(set(told.values())) != 1]
    counted = [commit["round"] for v in evidence.volunteers if v.name == evidence.latecomer for commit in v.commits
               if commit["counted"]]  # fmt: skip
    checkpoint = evidence.checkpoint
    return [
        Claim(
            f"the validation loss fell from {measured[0]:.2f} to {measured[-1]:.2f}"
            if measured
            else "no loss is known",
            len(measured) > 1 and measured[-1] < CLEAR_FALL * measured[0],
        ),
        Claim(
            f"all replicas computed equal state digests in each of {last_round} rounds, up to the last"
            + (f" (unequal: {unequal})" if unequal else ""),
            bool(digests) and not unequal and all(who <= set(told) for who, told in zip(survivors, final, strict=True)),
        ),
        Claim(
            f"{evidence.victim}, killed in round {evidence.killed_at_round}, left nothing behind"
            + "".join(f"; {what}" for what in evidence.left_behind),
            evidence.killed_at_round > 0 and not evidence.left_behind,
        ),
        Claim(f"{evidence.latecomer}, who joined late, was counted in {len(counted)} rounds", bool(counted)),
        Claim(
            "the other volunteers left by themselves when the run was over",
            all(v.exit_code == 0 for v in evidence.volunteers if v.name != evidence.victim),
        ),
        Claim(
            f"the download of round {checkpoint['round']} is verified, and is the state that all replicas hold",
            checkpoint["ok"]
            and checkpoint["round"] == last_round
            and all(set(told.values()) == {state} for told, state in zip(final, states, strict=True)),
        ),
        Claim(f"transformers opens it in a process without our code: {evidence.opened}", bool(evidence.opened)),
    ]


def tables(evidence: Evidence) -> list[Table]:
    """(title, columns, rows): the rounds, the volunteers, the checkpoint."""
    return [_rounds_table(evidence), _volunteers_table(evidence), _checkpoint_table(evidence)]


def figures(evidence: Evidence) -> dict[str, Any]:
    """The same for programs."""
    return {
        "rounds": len(evidence.status["rounds"]),
        "tokens": evidence.status["total tokens"],
        "tokens_per_s": round(tokens_per_s(evidence)),
        "validation_losses": losses(evidence),
        "killed_at_round": evidence.killed_at_round,
        "volunteers": {
            v.name: {
                "tokens_counted": sum(_shares(evidence, v)),
                "tokens_per_s": round(v.mean_tokens_per_s()),
                "bytes_sent": v.totals.get("sent bytes", 0),
            }
            for v in evidence.volunteers
        },
        "state_digest": evidence.checkpoint["state_digest"],
        "manifest_digest": evidence.checkpoint["manifest_digest"],
        "claims": {claim.text: claim.holds for claim in claims(evidence)},
    }


def tokens_per_s(evidence: Evidence) -> float:
    """Committed tokens of the whole swarm over time, from the first commit heard to the last."""
    first = [commit for v in evidence.volunteers for commit in v.commits if _shard(commit) == 0]
    heard = sorted((commit["at_s"], commit["committed tokens"]) for commit in first)
    if len(heard) < 2 or heard[-1][0] <= heard[0][0]:
        return 0.0
    return float((heard[-1][1] - heard[0][1]) / (heard[-1][0] - heard[0][0]))


def _rounds_table(evidence: Evidence) -> Table:
    rows: list[Sequence[object]] = [(0, 0, _loss(evidence.status["initial validation loss"]), "", *_blank(evidence))]
    for round_ in evidence.status["rounds"]:
        shares = [round_["shares"].get(v.peer_id) for v in evidence.volunteers]
        rows.append(
            (
                round_["round"],
                f"{round_['tokens']:,}",
                _loss(round_["validation loss"]),
                round_["absent parts"] or "",
                *("" if share is None else f"{share:,}" for share in shares),
            )
        )
    names = [f"by {v.name}" for v in evidence.volunteers]
    title = f"Rounds: {tokens_per_s(evidence):,.0f} tokens/s by all together"
    return title, ("round", "tokens", "validation loss", "absent parts", *names), rows


def _volunteers_table(evidence: Evidence) -> Table:
    rows: list[Sequence[object]] = []
    for v in evidence.volunteers:
        shares = _shares(evidence, v)
        fate = f"killed in round {evidence.killed_at_round}" if v.name == evidence.victim else "finished"
        joined = next((f"round {news['round'] + 1}" for news in v.news if news["event"] == "ready"), "-")
        megabytes = [f"{v.totals.get(key, 0) / 1e6:.1f} MB" for key in ("sent bytes", "received bytes")]
        # The coordinator tells shares of the first shard's rounds.
        counted = (len(shares), f"{sum(shares):,}") if 0 in v.hosts else (sum(c["counted"] for c in v.commits), "-")
        hosts = ", ".join(map(str, v.hosts))
        rows.append((v.name, hosts, joined, fate, *counted, f"{v.mean_tokens_per_s():,.0f}", *megabytes))
    columns = (
        "volunteer",
        "shards",
        "from",
        "fate",
        "rounds counted",
        "tokens counted",
        "tokens/s",
        "sent",
        "received",
    )
    return "Who contributed what", columns, rows


def _checkpoint_table(evidence: Evidence) -> Table:
    checkpoint = evidence.checkpoint
    rows: list[Sequence[object]] = [
        ("round", f"{checkpoint['round']}, after {checkpoint['total_tokens']:,} tokens"),
        ("state digest", checkpoint["state_digest"]),
        ("manifest digest", checkpoint["manifest_digest"]),
        ("size", f"{checkpoint['size_bytes'] / 1e6:.1f} MB in {checkpoint['num_files']} files"),
    ]
    return "Checkpoint", ("what", "value"), rows


def _shares(evidence: Evidence, volunteer: Volunteer) -> list[int]:
    """Tokens of this volunteer in each round that counted it, as the coordinator recorded them."""
    return [r["shares"][volunteer.peer_id] for r in evidence.status["rounds"] if volunteer.peer_id in r["shares"]]


def _blank(evidence: Evidence) -> list[str]:
    return [""] * len(evidence.volunteers)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
