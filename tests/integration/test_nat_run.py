"""A run over routers that translate addresses: everybody trains, seed peers come and go, and a newcomer gets in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peer.home import Home
from scripts.netlab.lab import Lab, Link, why_no_nat
from swarm import keyfiles
from tests.integration.processes import Program, end_all, environment, swarm, swarm_json, wait_for
from tests.integration.test_swarm_processes import LIMITS, PACKAGES, ROUNDS_S, START_S, write_run_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.netns,
    pytest.mark.skipif(bool(why_no_nat()), reason=str(why_no_nat())),
]

ORGANIZER, CONE, SYMMETRIC, PUBLIC, SECOND_SEED = range(5)
LINKS = [Link(), Link(nat="cone"), Link(nat="symmetric"), Link(), Link()]
SEED_PORT = 7001
CHANGES = {
    "total_tokens": 10**8,
    "rounds": {"tokens_per_round": 4096, "takeover_timeout_s": 3, "lease_s": 11},
    "admission": {"mode": "open"},
}


class Run:
    """The programs of one run, each in its namespace."""

    def __init__(self, folder: Path, data: Path, lab: Lab) -> None:
        self.folder, self.data, self.lab = folder, data, lab
        self.file = write_run_file(folder / "run", data, "behind-routers", CHANGES)
        self.programs: list[Program] = []
        self.invite = ""

    def start(self, name: str, place: int, *arguments: object) -> Program:
        env = environment(self.folder / name if name != "coordinator" else self.folder)
        program = Program(arguments, self.folder / f"says-{name}", env, self.lab.inside(place))
        self.programs.append(program)
        return program

    def start_coordinator(self) -> None:
        host = self.lab.address(ORGANIZER)
        hosts = ("--host", "0.0.0.0", "--public-host", host)
        coordinator = self.start("coordinator", ORGANIZER, "start", self.file, *hosts, "--no-seed")
        self.invite = coordinator.wait_news("started", START_S)["invite"]

    def start_seed(self, name: str, place: int, home: Path, *data: object) -> Program:
        where = ("--listen", f"0.0.0.0:{SEED_PORT}", "--announce", f"{self.lab.address(place)}:{SEED_PORT}")
        return self.start(name, place, "seed", self.invite, "--home", home, *where, *data)

    def join(self, name: str, place: int, *listen: object) -> Program:
        return self.start(name, place, "join", self.invite, "--home", self.folder / "home" / name, *LIMITS, *listen)

    def assert_equal_states(self) -> None:
        """Whoever applied a round said the same state digest."""
        told: dict[int, set[str]] = {}
        for commit in itertools.chain.from_iterable(program.commits for program in self.programs):
            told.setdefault(commit["round"], set()).add(commit["state digest"])
        assert len(told) > 2 and {number: states for number, states in told.items() if len(states) > 1} == {}


@contextmanager
def running(folder: Path) -> Iterator[Run]:
    with Lab(LINKS) as lab:
        arguments = ("--vocab-size", 512, "--validation-fraction", 0.05, "--token-shard-tokens", 65536)
        done = swarm("data", "prepare", *PACKAGES, "--out", folder / "data", *arguments, env=environment(folder))
        assert done.returncode == 0, done.stderr
        run = Run(folder, folder / "data", lab)
        try:
            yield run
        finally:
            end_all(run.programs)


def all_contribute(program: Program, count: int, after: int = 0) -> int:
    """Wait for a round after ``after`` with ``count`` contributors, of whom ``program`` is one; the round."""
    news = program.wait_news(
        "commit", ROUNDS_S, lambda news: news["round"] > after and news["counted"] and news["contributors"] == count
    )
    return int(news["round"])


def test_a_run_over_routers_outlives_its_first_seed_peer(tmp_path: Path) -> None:
    """Who cannot be dialled is counted; a second seed peer serves data, and the way in once the first is killed."""
    with running(tmp_path) as run:
        run.start_coordinator()
        first = run.start_seed("seed", ORGANIZER, run.file.parent / "state" / "seed", "--data", run.data)
        first.wait_news("ready", START_S)
        home = Home(tmp_path / "home" / "second")
        peer_id = keyfiles.load_or_create(home.key_path).peer_id
        listed = swarm_json("seeds", run.file, "--add", peer_id, env=environment(tmp_path))
        assert listed["seed_peers"] == [peer_id]
        second = run.start_seed("second", SECOND_SEED, home.folder)
        listen = ("--listen", "0.0.0.0:7002")
        volunteers = [run.join("cone", CONE, *listen), run.join("symmetric", SYMMETRIC)]
        volunteers.append(run.join("public", PUBLIC, *listen))
        number = max(all_contribute(volunteer, 3) for volunteer in volunteers)
        second.wait_news("progress", START_S, lambda news: len(set(news["token shards"].split(" of "))) == 1)
        wait_for(lambda: second.round >= number, "the second seed peer follows", ROUNDS_S)
        first.kill()
        number = max(all_contribute(volunteer, 3, number + 1) for volunteer in volunteers)
        newcomer = run.join("newcomer", CONE)
        all_contribute(newcomer, 4, number)
        run.assert_equal_states()
