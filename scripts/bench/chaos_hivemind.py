"""hivemind's averager under the same kills and stalls: survivors that say "ok", and what they then hold.

Its search for a group is not hurt: a fault falls into the all-reduce. Every round starts from the same vectors, and a
killed peer is started anew before the next.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from averaging_place import Place
from averaging_rivals import hivemind_averager
from chaos_faults import KILL, LATEST_S, Fault

from scripts.netlab.lab import Lab

# A round that takes longer is a hang: about a hundred times a healthy one.
LIMIT_S = 20.0
START_S = 60.0
GRACE_S = 5.0
# Of an equal share: less of a vector in an average is a contribution that was left out of part of it.
LEAST_SHARE = 0.9
ROUNDING = 0.05


class HivemindSwarm:
    def __init__(self, lab: Lab | None, peers: int, num_values: int, folder: Path) -> None:
        self._lab, self._num_values, self._folder = lab, num_values, folder
        self._context = multiprocessing.get_context("fork")
        self._processes: list[Any] = [None] * peers
        self._pipes: list[Any] = [None] * peers
        self._meet = ["" for _ in range(peers)]
        for peer in range(peers):
            self.start(peer)

    def start(self, peer: int) -> None:
        peers = len(self._processes)
        place = Place(
            index=peer,
            peers=peers,
            namespace=self._lab.namespace(peer) if self._lab is not None else "",
            address=self._lab.address(peer) if self._lab is not None else "127.0.0.1",
            device="lo",
            folder=self._folder / f"hivemind-{peer}",
            timeout_s=LIMIT_S,
        )
        self._pipes[peer], theirs = self._context.Pipe()
        self._processes[peer] = self._context.Process(target=hivemind_averager, args=(theirs, place))
        self._processes[peer].start()
        theirs.close()
        self._meet[peer] = ""
        meet = next((address for address in self._meet if address), "")
        self._meet[peer] = self.ask([peer], START_S, "begin", meet)[peer]["meet"]
        self.ask([peer], START_S, "prepare", self._num_values)

    def ask(self, peers: Iterable[int], limit_s: float, *command: Any) -> dict[int, dict[str, Any]]:
        """The answers that came in time."""
        asked = list(peers)
        for peer in asked:
            self._pipes[peer].send(command)
        return self.answers(asked, limit_s)

    def answers(self, peers: Iterable[int], limit_s: float) -> dict[int, dict[str, Any]]:
        deadline, found = time.monotonic() + limit_s, {}
        for peer in peers:
            with contextlib.suppress(EOFError, OSError):
                if self._pipes[peer].poll(max(0.0, deadline - time.monotonic())):
                    found[peer] = self._pipes[peer].recv()
        return found

    def signal(self, peer: int, number: int) -> None:
        """To the peer's process and all below it."""
        process = psutil.Process(self._processes[peer].pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                os.kill(one.pid, number)

    def restart(self, peer: int) -> None:
        with contextlib.suppress(psutil.Error):
            self.signal(peer, signal.SIGKILL)
        self._processes[peer].join()
        self.start(peer)

    def close(self) -> None:
        for peer in range(len(self._processes)):
            with contextlib.suppress(psutil.Error):
                self.signal(peer, signal.SIGKILL)
            self._processes[peer].join()

    def round(self, fault: Fault, healthy_s: float) -> tuple[Counter[str], float]:
        """One all-reduce with a fault within it; what became of the survivors, and how long the last of them took."""
        peers = range(len(self._processes))
        victims = fault.order[: fault.count] if fault.lasts_s else ()
        armed = self.ask(peers, LIMIT_S + GRACE_S, "arm")
        if len(armed) < len(peers) or any("error" in answer for answer in armed.values()):
            for peer in peers:
                self.restart(peer)
            return Counter(no_group=1), 0.0
        began = time.monotonic()
        for peer in peers:
            self._pipes[peer].send(("go",))
        at_s = fault.at_s / LATEST_S * healthy_s
        time.sleep(max(0.0, began + at_s - time.monotonic()))
        for peer in victims:
            self.signal(peer, signal.SIGKILL if fault.kind == KILL else signal.SIGSTOP)
        if victims and fault.kind != KILL:
            time.sleep(fault.lasts_s)
            for peer in victims:
                self.signal(peer, signal.SIGCONT)
        survivors = [peer for peer in peers if fault.kind != KILL or peer not in victims]
        answers = self.answers(survivors, began + LIMIT_S + GRACE_S - time.monotonic())
        ok = {peer: answer for peer, answer in answers.items() if "error" not in answer}
        groups = Counter(answer["tensor_digest"] for answer in ok.values())
        shares = [answer["shares"] for answer in ok.values()]
        alike = [sum(_are_alike(one, other) for other in shares) for one in shares]
        late = [answer for answer in answers.values() if "Timeout" in answer.get("error", "")]
        outcome = Counter(
            survivors=len(survivors),
            ok=len(ok),
            unequal=len(ok) - max(alike, default=0),
            other_bits=len(ok) - max(groups.values(), default=0),
            lost=sum(any(ok[q]["shares"][p] < LEAST_SHARE / len(peers) for q in ok if q != p) for p in ok),
            hung=bool(late) or len(answers) < len(survivors),
        )
        for peer in peers:
            if peer not in answers:
                self.restart(peer)
        return outcome, max((answer["ended"] for answer in ok.values()), default=time.monotonic()) - began


def _are_alike(one: list[float], other: list[float]) -> bool:
    """Whether two averages hold the same of each peer's vector, but for rounding."""
    return all(abs(a - b) < ROUNDING / len(one) for a, b in zip(one, other, strict=True))


def measure(swarm: HivemindSwarm, faults: list[Fault], note: Callable[[str], None]) -> dict[str, Any]:
    """All rounds. ``unequal``: by more than rounding, as its 8-bit averages differ in bits even where all is well;
    ``lost``: survivors that were told "ok" while what they brought is not in another's average."""
    total: Counter[str] = Counter()
    healthy = Fault(kind=KILL, at_s=0.0, lasts_s=0.0, order=())
    seconds = [swarm.round(healthy, 0.0)[1] for _ in range(3)]
    healthy_s = sorted(seconds)[1]
    for number, fault in enumerate(faults):
        outcome, took_s = swarm.round(fault, healthy_s)
        note(f"hivemind {number}: {fault.kind} {fault.order[: fault.count]}: {dict(outcome)} in {took_s:.1f} s")
        total += outcome
    return {
        "hivemind_rounds": len(faults) - total["no_group"],
        "hivemind_faults": len(faults) - total["no_group"],
        "hivemind_unequal_survivors": total["unequal"],
        "hivemind_other_bits": total["other_bits"],
        "hivemind_hangs": total["hung"],
        "hivemind_lost": total["lost"],
        "hivemind_survivors": total["survivors"],
        "hivemind_ok": total["ok"],
        "hivemind_healthy_s": round(healthy_s, 3),
        "hivemind_no_group": total["no_group"],
    }
