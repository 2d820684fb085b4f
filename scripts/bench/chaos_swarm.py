"""Peers of the run under faults, as the benchmark holds them: started, killed, stalled, cut off, and heard.

Decides how a fault is carried out and what a process has told; leaves which faults to `chaos_faults` and whether all
is well to `chaos_account`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from averaging_ours import identity_of
from averaging_place import Place
from chaos_account import Life, Told
from chaos_faults import KILL, PARTITION, STALL, Fault
from chaos_peer import Rules, chaos_peer

from scripts.netlab.lab import Lab

START_S = 60.0
# Below the ports that systems hand out by themselves, and not those of another run: libp2p would share a port with it.
FIRST_PORT = 21_000


class Stuck(Exception):
    """Something did not come to its end in time; the message says what."""


@dataclass(slots=True)
class Process:
    """A life, and what it takes to talk to it."""

    life: Life
    process: Any
    orders: Any
    told: Any
    ready_at: int | None = None
    """the round that it stood at when it had started"""
    stalled: bool = False
    reached: int = 0


@dataclass(slots=True, kw_only=True)
class Setting:
    """Where the peers live."""

    lab: Lab | None
    """None: all on the machine's loopback"""
    together: bool = False
    """all in the first namespace, on its loopback"""
    folder: Path
    peers: int
    rules: Rules


class Swarm:
    def __init__(self, setting: Setting, note: Callable[[str], None]) -> None:
        self._setting = setting
        self._note = note
        self._context = multiprocessing.get_context("fork")
        self._up: dict[int, Process] = {}
        self._due: list[tuple[float, str, Fault | int]] = []
        """(when, what, of which fault or peer)"""
        self._keys: dict[int, bytes] = {}
        self._cut_off: list[int] = []
        self.lives: list[Life] = []
        self.killed_at: dict[int, float] = {}
        """of each peer, the last time"""
        self.opened: dict[int, float] = {}
        self.on_told: Callable[[Life, Told], None] = lambda life, told: None

    # ---- peers --------------------------------------------------------------------------------------------------

    def start(self, peer: int, *, anew: bool) -> None:
        setting = self._setting
        lab = setting.lab
        place = Place(
            index=peer,
            peers=setting.peers,
            namespace=lab.namespace(0 if setting.together else peer) if lab is not None else "",
            address=self._address(peer),
            device="lo",
            folder=setting.folder / str(peer),
            timeout_s=setting.rules.reduce_timeout_s,
            port=FIRST_PORT + os.getpid() % 1000 * setting.peers + peer,
            begins_anew=anew,
        )
        others = {other: self._address(other) for other in self.up}
        orders, their_orders = self._context.Pipe()
        told, their_told = self._context.Pipe()
        process = self._context.Process(
            target=chaos_peer, args=(their_orders, their_told, place, setting.rules, others)
        )
        process.start()
        their_orders.close()
        their_told.close()
        life = Life(peer)
        self.lives.append(life)
        self._up[peer] = Process(life, process, orders, told)
        self._keys[peer] = identity_of(place, peer).public_key

    def _address(self, peer: int) -> str:
        setting = self._setting
        return "127.0.0.1" if setting.lab is None or setting.together else setting.lab.address(peer)

    @property
    def up(self) -> list[int]:
        """Peers whose process takes part."""
        return [peer for peer, one in self._up.items() if one.ready_at is not None]

    def reached(self, peer: int) -> int:
        """The last round that a peer, up, has applied."""
        return self._up[peer].reached

    @property
    def well(self) -> list[int]:
        """Peers that are up, awake and within reach."""
        return [peer for peer in self.up if not self._up[peer].stalled and peer not in self._cut_off]

    def key(self, peer: int) -> bytes:
        return self._keys[peer]

    def ended(self, number: int) -> float:
        """When the last of those that are up had the round."""
        return max(one.life.told[number].at for one in self._up.values() if number in one.life.told)

    def voters(self) -> list[int]:
        """Who decides the next round, by the last commit that was told; nobody: none was."""
        told = [one.life.told[one.reached] for one in self._up.values() if one.reached in one.life.told]
        return max(told, key=lambda t: t.round).voters if told else []

    def train(self, peer: int, tokens: int) -> None:
        self._up[peer].orders.send(tokens)

    def close(self) -> None:
        for one in list(self._up.values()):
            with contextlib.suppress(Stuck):
                self._kill(one.life.peer)

    # ---- faults -------------------------------------------------------------------------------------------------

    def schedule(self, fault: Fault, since: float) -> None:
        """Let it happen in time; `wait` carries it out, and heals it."""
        self._due.append((since + fault.at_s, "hurt", fault))

    @property
    def hurt(self) -> bool:
        """Somebody is stalled, cut off, or yet to be hurt."""
        return any(what != "start" for _, what, _ in self._due)

    def _hurt(self, fault: Fault, now: float) -> None:
        victims = [peer for peer in fault.order if peer in self.up][: fault.count]
        if len(self.up) - len(victims) < self._setting.peers // 2 + 1:
            victims = victims[:1]
        self._note(f"{fault.kind}{' one way' * fault.one_way} {victims} for {fault.lasts_s:.2f} s")
        if fault.kind == KILL:
            for peer in victims:
                self._kill(peer)
                self._due.append((now + fault.lasts_s, "start", peer))
        elif fault.kind == STALL:
            for peer in victims:
                self._up[peer].stalled = True
                _signal_tree(self._up[peer].process.pid, signal.SIGSTOP)
                self._due.append((now + fault.lasts_s, "wake", peer))
        elif fault.kind == PARTITION and self._setting.lab is not None:
            others = [peer for peer in range(self._setting.peers) if peer not in victims]
            self._cut_off = victims
            self._setting.lab.cut(victims, others)
            if not fault.one_way:
                self._setting.lab.cut(others, victims)
            self._due.append((now + fault.lasts_s, "join", 0))

    def _kill(self, peer: int) -> None:
        one, self.killed_at = self._up.pop(peer), self.killed_at | {peer: time.monotonic()}
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.process.pid, signal.SIGKILL)
        one.process.join()
        self._hear(one)
        one.life.ended_in = max(one.reached, one.ready_at or 0) + 1
        one.orders.close()
        one.told.close()

    def _heal(self, what: str, peer: int) -> None:
        if what == "start":
            self.start(peer, anew=False)
        elif what == "wake":
            self._up[peer].stalled = False
            _signal_tree(self._up[peer].process.pid, signal.SIGCONT)
        elif self._setting.lab is not None:
            self._cut_off = []
            self._setting.lab.heal()
        self._note(f"{what} {peer}" if what != "join" else what)

    # ---- time ---------------------------------------------------------------------------------------------------

    def wait(self, until: Callable[[], bool], limit_s: float, what: str) -> None:
        """Hear what is told, hurt and heal in time, until it is so; raises `Stuck` when the limit is over."""
        deadline = time.monotonic() + limit_s
        while not until():
            now = time.monotonic()
            if now > deadline:
                raise Stuck(f"{what}: not within {limit_s:.0f} s")
            if self._do_what_is_due(now):
                continue
            next_at = min((at for at, _, _ in self._due), default=deadline)
            pipes = {one.told: one for one in self._up.values()}
            for pipe in multiprocessing.connection.wait(pipes, max(0.0, min(next_at, deadline) - now)):
                self._hear(pipes[pipe])
                if not pipes[pipe].process.is_alive():
                    raise Stuck(f"peer {pipes[pipe].life.peer} has ended by itself")

    def _do_what_is_due(self, now: float) -> bool:
        due = sorted((item for item in self._due if item[0] <= now), key=lambda item: item[0])
        for item in due:
            self._due.remove(item)
            _, name, of = item
            if isinstance(of, Fault):
                self._hurt(of, now)
            else:
                self._heal(name, of)
        return bool(due)

    def _hear(self, one: Process) -> None:
        for line in _lines(one.told):
            kind = line.pop("kind")
            if kind == "ready":
                one.ready_at = one.reached = line["round"]
                one.life.owed = line["owed"]
                self._note(f"{one.life.peer} is ready after round {one.reached}")
            elif kind == "opened":
                self.opened.setdefault(line["round"], line["at"])
            elif kind == "snapshot":
                one.life.offered = line["tokens"]
            elif kind == "commit":
                told = Told(**line)
                one.reached = told.round
                one.life.told[told.round] = told
                self.on_told(one.life, told)
            else:
                self._note(f"{one.life.peer}: {line}")
                raise Stuck(f"peer {one.life.peer} has ended: {line.get('error')}")


def _lines(pipe: Any) -> Iterator[dict[str, Any]]:
    """What was told so far; of a process that has ended too."""
    with contextlib.suppress(EOFError, OSError):
        while pipe.poll():
            yield json.loads(pipe.recv_bytes())
    return


def _signal_tree(pid: int, number: int) -> None:
    """To a process and everything below it, p2pd and its guard too: as when a lid is closed."""
    with contextlib.suppress(psutil.Error):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
