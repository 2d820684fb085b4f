"""The peers of the churn benchmark: started, killed by SIGKILL, started again, and what all their lives counted.

Decides how a life begins again: after `START_S`, in which a volunteer's own processor would import libraries (here it
sleeps, as its siblings must not pay for that), a new process takes the place's folder, opens libp2p at the same address
and loads its anchor from disk, under its quota. Leaves when to kill to `churn`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from averaging_ours import identity_of
from averaging_place import Place as Seat
from pipeline_ours import LEARNED, NUM_COUNTS, ours
from pipeline_task import Task

from scripts.netlab.lab import Lab

# What imports take a killed peer before it can do anything (docs/benchmarks.md, "What the transport costs").
START_S = 3.0
TICK_S = 0.05
ANSWER_S = 180.0
PORT = 21_500


@dataclass(slots=True)
class Life:
    peer: int
    tally: Any
    process: Any
    pipe: Any
    began_s: float
    is_up: bool = False


class Swarm:
    """``peers`` of ``task``, each in its namespace of ``lab``."""

    def __init__(self, peers: int, task: Task, lab: Lab, folder: Path) -> None:
        self._task, self._context = task, multiprocessing.get_context("fork")
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

    @property
    def num_up(self) -> int:
        return sum(life.is_up for life in self.lives.values())

    def learned(self) -> list[int]:
        """Tokens of inner steps, of each place and all its lives."""
        now = [self.lives[i].tally[LEARNED] if i in self.lives else 0 for i in range(len(self._seats))]
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
        self._returns[peer] = time.monotonic() + START_S

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

    def _tick(self, seconds: float) -> None:
        starting = [life for life in self.lives.values() if not life.is_up]
        ready = multiprocessing.connection.wait([life.pipe for life in starting], seconds) if starting else []
        if not starting:
            time.sleep(seconds)
        for life in starting:
            if life.pipe in ready and self._hear(life, 0) == {}:  # what `prepare` answers
                life.is_up = True
                if life.peer in self._returns:
                    self.return_seconds.append(time.monotonic() - self._returns.pop(life.peer) + START_S)
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
