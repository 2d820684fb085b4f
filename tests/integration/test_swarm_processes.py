"""A whole swarm of real processes: the public commands over real libp2p, gRPC, TLS and SQLite, hurt and healed.

One swarm lives through the first tests; each of them leaves it as healthy as it found it, but the last, which ends
it. Every test ends with equal state digests. A second, short run is seen to its end.
"""

from __future__ import annotations

import getpass
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from peer.home import Home
from swarm import keyfiles, presets, run_file
from swarm.invite import parse
from tests.integration.processes import (
    Program,
    end_all,
    environment,
    footprint,
    is_alive,
    is_locked,
    swarm,
    swarm_json,
    wait_for,
)

pytestmark = pytest.mark.slow

PACKAGES = tuple(Path(json.__file__).parents[1] / name for name in ("json", "email", "asyncio"))
TOKENS_PER_ROUND = 8192  # with the limits below about two seconds of three volunteers on two idle cores
LIMITS = ("--threads", 1, "--duty", 30)
START_S, ROUNDS_S, LEAVE_S = 120.0, 90.0, 10.0
SHORT_ROUND_TOKENS, SHORT_RUN_TOKENS = 4096, 20 * 4096  # a slow round may take in five rounds' tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few packages of the standard library, prepared once."""
    folder = tmp_path_factory.mktemp("prepared")
    arguments = ("--vocab-size", 512, "--validation-fraction", 0.05, "--token-shard-tokens", 65536)
    done = swarm("data", "prepare", *PACKAGES, "--out", folder / "data", *arguments, env=environment(folder))
    assert done.returncode == 0, done.stderr
    return folder / "data"


def write_run_file(folder: Path, data: Path, name: str, changes: Mapping[str, Any]) -> Path:
    """A run file of the tiny preset with short rounds."""
    values = presets.preset("tiny", name).model_dump()
    values["data"]["path"] = str(data)
    values["rounds"] |= {"tokens_per_round": TOKENS_PER_ROUND}
    for section, value in changes.items():
        values[section] = {**values[section], **value} if isinstance(value, dict) else value
    folder.mkdir(parents=True)
    path = folder / run_file.FILE_NAME
    path.write_text(run_file.render(run_file.RunFile.model_validate(values)))
    return path


@dataclass
class Swarm:
    """The processes of one run, and where they keep what they keep."""

    folder: Path
    run_file: Path
    data: Path
    invite: str = ""
    programs: list[Program] = field(default_factory=list)
    volunteers: dict[str, Program] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return environment(self.folder)

    @property
    def peers(self) -> list[Program]:
        return [self.seed, *self.volunteers.values()]

    def start_coordinator(self, *more: str) -> None:
        self.coordinator = self._start("coordinator", "start", self.run_file, *more)
        self.invite = self.coordinator.wait_news("started", START_S)["invite"]

    def start_seed(self) -> None:
        home = self.run_file.parent / "state" / "seed"
        self.seed = self._start("seed", "seed", self.invite, "--home", home, "--data", self.data)
        self.seed.wait_news("ready", START_S)

    def join(self, name: str, *more: object) -> Program:
        self.volunteers[name] = self._start(name, "join", self.invite, "--home", self.home(name), *LIMITS, *more)
        return self.volunteers[name]

    def home(self, name: str) -> Path:
        return self.folder / "homes" / name

    def states_on_disk(self, name: str) -> list[int]:
        return [int(path.name.removeprefix("state-")) for path in self.home(name).glob("runs/*/shard-0/state-*")]

    def until_round(self, number: int, programs: list[Program]) -> None:
        for program in programs:
            program.wait_news("commit", ROUNDS_S, lambda news: news["round"] >= number)

    def more_rounds(self, count: int, programs: list[Program]) -> None:
        """Wait until each of ``programs`` has applied ``count`` rounds more than any has now."""
        self.until_round(max(program.round for program in programs) + count, programs)

    def assert_equal_states(self) -> None:
        """Whoever applied a round, in whichever life, said the same state digest."""
        told: dict[int, set[str]] = {}
        for commit in itertools.chain.from_iterable(program.commits for program in self.programs):
            told.setdefault(commit["round"], set()).add(commit["state digest"])
        assert told and {number: states for number, states in told.items() if len(states) > 1} == {}

    def end(self) -> None:
        end_all(self.programs)

    def _start(self, name: str, *arguments: object) -> Program:
        life = self.folder / "lives" / f"{len(self.programs)}-{name}"
        program = Program(arguments, life, environment(life) | {"XDG_DATA_HOME": self.env["XDG_DATA_HOME"]})
        self.programs.append(program)
        return program


@pytest.fixture(scope="module")
def running(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """A coordinator, a seed peer and three volunteers, three rounds after their start."""
    folder = tmp_path_factory.mktemp("swarm")
    rules = write_run_file(folder / "run", data, "hurt", {"total_tokens": 10**9, "checkpoints": {"every_rounds": 1000}})
    made = Swarm(folder, rules, data)
    try:
        made.start_coordinator("--no-seed")
        made.start_seed()
        for name in ("anna", "bert", "cora"):
            made.join(name)
        made.until_round(3, made.peers)
        yield made
    finally:
        made.end()


def counted_after(program: Program, number: int) -> dict[str, Any]:
    """The first commit after round ``number`` that counts what this volunteer trained."""
    return program.wait_news("commit", ROUNDS_S, lambda news: news["counted"] and news["round"] > number)


def test_three_volunteers_commit_rounds_and_hold_equal_states(running: Swarm) -> None:
    """Every volunteer is counted, and every word about a round names the same state."""
    for program in running.volunteers.values():
        counted_after(program, 0)
    contributors = [commit["contributors"] for commit in running.seed.commits]
    assert max(contributors) == 3
    running.assert_equal_states()


def test_a_volunteer_killed_in_mid_round_leaves_nothing_and_comes_back_from_its_own_disk(running: Swarm) -> None:
    """SIGKILL of the main process: the others commit on, it restarts from its newest state, and is counted again."""
    victim = running.volunteers["bert"]
    number = running.seed.round
    told = victim.wait_news("commit", ROUNDS_S, lambda news: news["round"] > number)
    victim.wait_news("progress", ROUNDS_S, lambda news: news["my tokens"] > told["my tokens"])
    occupied = victim.footprint()
    assert len(occupied.processes) == 3 and occupied.sockets and is_locked(running.home("bert") / "peer.key")
    victim.kill()
    wait_for(lambda: not occupied.remains(), "nothing of it remains", 10, lambda: str(occupied.remains()))
    assert not is_locked(running.home("bert") / "peer.key")
    others = [running.seed, running.volunteers["anna"], running.volunteers["cora"]]
    running.more_rounds(1, others)
    newest = max(running.states_on_disk("bert"))
    again = running.join("bert")
    assert again.wait_news("ready", START_S)["round"] >= newest > 0, "and the rounds after it that lie there"
    counted_after(again, again.wait_news("commit", ROUNDS_S)["round"])
    running.assert_equal_states()


def test_a_trainer_outlives_its_network_daemon_and_is_counted_again(running: Swarm) -> None:
    """SIGKILL of a volunteer's p2pd: training goes on in the same process, another p2pd starts, rounds count it."""
    victim = running.volunteers["cora"]
    process = psutil.Process(victim.pid)
    p2pd = next(child for child in process.children(recursive=True) if child.name() == "p2pd")
    before = victim.of_kind("progress")[-1]["my tokens"]
    p2pd.kill()
    number = victim.round
    victim.wait_news("progress", ROUNDS_S, lambda news: news["my tokens"] > before)
    # What was under way when p2pd died may still be counted; the round after it was made over the new one.
    counted_after(victim, number + 1)
    assert is_alive(process) and victim.wait_news("joining", 1)
    daemons = [child for child in process.children(recursive=True) if child.name() == "p2pd"]
    assert len(daemons) == 1 and daemons[0].pid != p2pd.pid
    assert len(victim.of_kind("ready")) == 1
    running.assert_equal_states()


def test_training_goes_on_without_the_coordinator_which_then_catches_up_on_every_commit(running: Swarm) -> None:
    """SIGKILL for several rounds: nothing that it knew is lost, nothing that happened meanwhile is missed."""
    before = swarm_json("status", running.invite, env=running.env)
    running.coordinator.kill()
    invite, number = running.invite, running.seed.round
    running.more_rounds(3, running.peers)
    assert swarm("status", invite, env=running.env).returncode == 69
    running.start_coordinator("--no-seed")
    assert running.invite == invite, "the invite that people have leads here again"

    def caught_up() -> Any:
        status = swarm_json("status", invite, env=running.env)
        return status if status["round"] > number + 3 else None

    after = wait_for(caught_up, "the coordinator knows the rounds that it missed", ROUNDS_S)
    recorded = {entry["round"]: entry for entry in after["rounds"]}
    assert sorted(recorded) == list(range(1, after["round"] + 1))
    assert [recorded[entry["round"]]["shares"] for entry in before["rounds"]] == [
        entry["shares"] for entry in before["rounds"]
    ]
    told = {commit["round"]: commit["committed tokens"] for commit in running.seed.commits}
    assert {number: told[number] for number in recorded} == {n: entry["tokens"] for n, entry in recorded.items()}
    running.assert_equal_states()


def test_a_late_volunteer_joins_and_is_counted_and_leaves_in_time_with_nothing_left(running: Swarm) -> None:
    """SIGTERM, as an operating system says it: exit code 0, no process, socket, lock or temporary file of ours."""
    late = running.join("dora")
    assert late.wait_news("ready", START_S)["round"] > 0
    counted_after(late, 0)
    assert_leaves(running, "dora", signal.SIGTERM)
    running.more_rounds(1, running.peers)
    running.assert_equal_states()


def test_a_volunteer_leaves_on_ctrl_c_in_time_with_nothing_left(running: Swarm) -> None:
    """And says so: nobody waits for it any more."""
    left = running.volunteers["anna"]
    assert_leaves(running, "anna", signal.SIGINT)
    assert left.news[-1]["event"] == "left"
    running.more_rounds(1, running.peers)
    running.assert_equal_states()


def assert_leaves(running: Swarm, name: str, number: signal.Signals) -> None:
    program = running.volunteers.pop(name)
    occupied = program.footprint()
    assert program.leave(number, LEAVE_S) == 0, program.last_words()
    assert occupied.remains() == []
    # bitsandbytes lets torch make the folder of its compiler's cache, one for all programs of a user.
    assert {path.name for path in program.temporary.iterdir()} <= {f"torchinductor_{getpass.getuser()}"}
    assert not is_locked(running.home(name) / "peer.key")
    # A newcomer's first few steps may agree too little with the others' to be averaged: it is told so.
    assert [line for line in program.errors.splitlines() if ": rejected: " not in line] == []


CLEAN_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits
    ours = [name for name in sys.modules if name.split(".")[0] in ("swarm", "peer", "coordinator")]
    print(json.dumps({"shape": list(logits.shape), "finite": bool(torch.isfinite(logits).all()), "ours": ours,
                      "dtype": str(model.dtype)}))
"""


def test_a_run_ends_with_a_published_checkpoint_that_transformers_opens(data: Path, tmp_path: Path) -> None:
    """`swarm start` with a seed peer of its own, two volunteers to the last round, download, verify, open, Ctrl-C.

    A further seed peer that joins after all that has the whole archive in the end: the first one's folder may go.
    """
    changes = {
        "total_tokens": SHORT_RUN_TOKENS,
        "rounds": {"tokens_per_round": SHORT_ROUND_TOKENS},
        "checkpoints": {"every_rounds": 2},
    }
    run = Swarm(tmp_path, write_run_file(tmp_path / "run", data, "short", changes), data)
    try:
        run.start_coordinator()
        run.coordinator.wait_news("seed ready", START_S)
        volunteers = [run.join(name) for name in ("anna", "bert")]
        assert [program.wait_exit(START_S + ROUNDS_S) for program in volunteers] == [0, 0]
        finished = [program.wait_news("finished", 1) for program in volunteers]
        status = swarm_json("status", run.invite, env=run.env)
        assert {news["round"] for news in finished} == {status["round"]}
        assert status["total tokens"] >= status["target tokens"] == SHORT_RUN_TOKENS
        assert status["rounds"][-1]["validation loss"] < status["initial validation loss"]
        run.assert_equal_states()
        assert_last_checkpoint_opens(run, status["round"])
        assert_the_log_makes_the_last_checkpoint(run, status["round"])
        start_late_seed(run, status["round"])
        occupied = footprint(run.coordinator.pid)
        assert run.coordinator.leave(signal.SIGINT, 2 * LEAVE_S) == 0, run.coordinator.last_words()
        assert occupied.remains() == []
        shutil.rmtree(run.run_file.parent / "state" / "seed")
        run.start_coordinator("--no-seed", "--port", parse(run.invite).addresses[0].rpartition(":")[2])
        assert_audited_without_the_first_seed_peer(run, status["round"])
    finally:
        run.end()


def assert_last_checkpoint_opens(run: Swarm, last: int) -> None:
    listed = swarm_json("checkpoints", run.invite, env=run.env)
    assert [entry["round"] for entry in listed["checkpoints"]] == sorted({*range(2, last, 2), last}, reverse=True)
    got = swarm_json("download", run.invite, "--out", run.folder / "got", env=run.env)
    folder = Path(got["folder"])
    verified = swarm_json("verify", folder, "--run", run.invite, env=run.env)
    state = next(commit["state digest"] for commit in run.programs[-1].commits if commit["round"] == last)
    assert verified["state_digest"] == state
    assert verified["live_replicas"] / 2 < len(verified["witnesses"]) >= 2, "the seed peer, and a volunteer at least"
    assert verified["bf16_set"] == "recomputed"
    half = swarm_json("download", run.invite, "--dtype", "bf16", "--out", run.folder / "half", env=run.env)
    assert half["size_bytes"] < 0.6 * got["size_bytes"] and half["bf16_set"] == "listed"
    command = [sys.executable, "-I", "-c", CLEAN_PROCESS, str(folder), half["folder"]]
    clean = {"HOME": str(run.folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=run.folder, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    opened = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    assert [model["dtype"] for model in opened] == ["torch.float32", "torch.bfloat16"]
    assert all(model["finite"] and model["ours"] == [] and model["shape"][-1] == 512 for model in opened)


def assert_the_log_makes_the_last_checkpoint(run: Swarm, last: int) -> None:
    """In the seed peer's folder; over the network, from the genesis, and from round 2 with the momentum after it."""
    (archive,) = run.folder.glob("run/**/seed/runs/*")
    folder, env = run.folder / "got" / f"round-{last:06d}", run.env | {"XDG_DATA_HOME": str(run.folder / "x")}
    audits = ([folder, "--archive", archive], 0), ([folder, "--run", run.invite], 0), ([run.invite, "--from", "2"], 2)
    for arguments, first in audits:
        audited = swarm_json("audit", *arguments, env=env)
        assert (audited["outcome"], audited["from_round"], audited["equal_to"]) == ("equal", first, last)


def start_late_seed(run: Swarm, last: int) -> None:
    """A further seed peer, once its archive is whole."""
    home = Home(run.folder / "late")
    swarm_json("seeds", run.run_file, "--add", keyfiles.load_or_create(home.key_path).peer_id, env=run.env)
    late = run._start("late", "seed", run.invite, "--home", home.folder)
    late.wait_news("progress", START_S, lambda news: news.get("archived rounds") == f"{last} of {last}")


def assert_audited_without_the_first_seed_peer(run: Swarm, last: int) -> None:
    """Over the network, by somebody who has the checkpoint and nothing else."""
    folder, env = run.folder / "got" / f"round-{last:06d}", run.env | {"XDG_DATA_HOME": str(run.folder / "y")}
    audited = swarm_json("audit", folder, "--run", run.invite, env=env)
    assert (audited["outcome"], audited["equal_to"]) == ("equal", last)
