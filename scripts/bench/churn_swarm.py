"""The peers of the churn benchmark: started, killed by SIGKILL, started again, and what all their lives counted.

Decides how a life begins again: after ``start_s``, in which a volunteer's own processor would import libraries (here it
sleeps, as its siblings must not pay for that), a new process takes the place's folder, opens libp2p at the same address
and loads its anchor from disk, under its quota. Leaves when to kill to `churn`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from averaging_ours import identity_of
from averaging_place import Place as Seat
from pipeline_ours import GATHERED, LEARNED, NUM_COUNTS, ours
from pipeline_task import Task

from scripts.netlab.lab import Lab

TICK_S = 0.05
ANSWER_S = 180.0
PORT = 21_500


IMPORTS = "import pipeline_ours, pipeline_task; pipeline_ours.preload(pipeline_task.Task())"


def import_s(times: int = 3) -> float:
    """Processor seconds in which a new process imports what a peer does: what that takes on a core of one's own."""
    took_s = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", IMPORTS], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(took_s)


@dataclass(slots=True)
class Life:
    peer: int
    tally: Any
    process: Any
    pipe: Any
    began_s: float
    is_up: bool = False


class Swarm:
    """``peers`` of ``task``, each in its namespace of ``lab``; who was killed begins again ``start_s`` later."""

    def __init__(self, peers: int, task: Task, lab: Lab, folder: Path, start_s: float) -> None:
        self._task, self._context, self._start_s = task, multiprocessing.get_context("fork"), start_s
        self._seats = [
            Seat(
                index=index,
                peers=peers,
                namespace=lab.namespace(index),
                address=lab.address(index),
                device="eth0",
                folder=folder / str(index),
                timeout_s=task.timeout_s,
                port=PORT,
                begins_anew=False,
            )
            for index in range(peers)
        ]
        self._meets = [f"/ip4/{s.address}/tcp/{PORT}/p2p/{identity_of(s, s.index).peer_id}" for s in self._seats]
        self._returns: dict[int, float] = {}
        """when a peer that is down is started again"""
        self.lives: dict[int, Life] = {}
        self._past_learned = [0] * peers
        self.return_seconds: list[float] = []
        """from each SIGKILL until the peer trained again"""
        self.bound_s = 0.0
        """seconds so far, each times the share of its replicas that the shard with the fewest had"""
        self._bounded_at_s = time.monotonic()

    @property
    def num_up(self) -> int:
        return sum(life.is_up for life in self.lives.values())

    def learned(self) -> list[int]:
        """Tokens of inner steps, and those gathered for the next, of each place and all its lives."""
        tallies = [self.lives[i].tally if i in self.lives else None for i in range(len(self._seats))]
        now = [tally[LEARNED] + tally[GATHERED] if tally is not None else 0 for tally in tallies]
        return [past + tokens for past, tokens in zip(self._past_learned, now, strict=True)]

    def start_all(self) -> None:
        """Whoever reads the data comes last."""
        for index in reversed(range(len(self._seats))):
            self._start(index)
        self.wait(lambda: self.num_up == len(self._seats), ANSWER_S)

    def kill(self, peer: int) -> None:
        """By SIGKILL; its p2pd ends with it. Nothing where it is down already."""
        life = self.lives.pop(peer, None)
        if life is None:
            return
        os.kill(life.process.pid, signal.SIGKILL)
        life.process.join()
        life.pipe.close()
        self._past_learned[peer] += life.tally[LEARNED]
        self._returns[peer] = time.monotonic() + self._start_s

    def run(self, seconds: float) -> None:
        """Let time pass; who is due comes back."""
        ends_s = time.monotonic() + seconds
        while (left_s := ends_s - time.monotonic()) > 0:
            self._tick(min(TICK_S, left_s))

    def wait(self, condition: Any, at_most_s: float) -> None:
        ends_s = time.monotonic() + at_most_s
        while not condition():
            if time.monotonic() > ends_s:
                raise TimeoutError("the peers did not get there in time")
            self._tick(TICK_S)

    def drain(self) -> list[Life]:
        """Read nothing more; wait for what is under way. The lives that read, with what they counted."""
        self.wait(lambda: self.num_up == len(self._seats), ANSWER_S)
        shards = len(self._seats) // self._task.replicas
        sources = [life for peer, life in self.lives.items() if peer % shards == 0]
        for life in sources:
            life.pipe.send(("drain",))
        for life in sources:
            self._hear(life, ANSWER_S)
        return sources

    def close(self) -> None:
        for peer in list(self.lives):
            self.kill(peer)

    def _start(self, peer: int) -> None:
        mine, theirs = self._context.Pipe()
        tally = RawArray("q", NUM_COUNTS)
        process = self._context.Process(target=ours, args=(theirs, self._seats[peer], self._task, tally))
        process.start()
        theirs.close()
        up = [self._meets[other] for other, life in self.lives.items() if life.is_up]
        mine.send(("begin", *up))
        mine.send(("prepare", self._meets))
        self.lives[peer] = Life(peer, tally, process, mine, time.monotonic())

    def _bound(self) -> None:
        shards = len(self._seats) // self._task.replicas
        fewest = min(sum(life.is_up for i, life in self.lives.items() if i % shards == s) for s in range(shards))
        now_s = time.monotonic()
        self.bound_s += (now_s - self._bounded_at_s) * fewest / self._task.replicas
        self._bounded_at_s = now_s

    def _tick(self, seconds: float) -> None:
        self._bound()
        starting = [life for life in self.lives.values() if not life.is_up]
        ready = multiprocessing.connection.wait([life.pipe for life in starting], seconds) if starting else []
        if not starting:
            time.sleep(seconds)
        for life in starting:
            if life.pipe in ready and self._hear(life, 0) == {}:  # what `prepare` answers
                life.is_up = True
                if life.peer in self._returns:
                    self.return_seconds.append(time.monotonic() - self._returns.pop(life.peer) + self._start_s)
        for peer, when in self._returns.items():
            if peer not in self.lives and time.monotonic() >= when:
                self._start(peer)

    @staticmethod
    def _hear(life: Life, at_most_s: float) -> dict[str, Any]:
        if not life.pipe.poll(at_most_s):
            raise TimeoutError(f"peer {life.peer} did not answer")
        answer: dict[str, Any] = life.pipe.recv()
        if "error" in answer:
            raise RuntimeError(f"peer {life.peer}: {answer['error']}\n{answer['trace']}")
        return answer
