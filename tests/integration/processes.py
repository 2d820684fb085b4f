"""Real processes of the public command line for the integration tests: started, listened to, killed, and all ended.

Decides how a test waits (bounded, and with the process's last words in the failure) and what counts as left behind.
Every process is ended by its own id, never by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CLI = (sys.executable, "-m", "swarm.cli.main")
ROOT = Path(__file__).parents[2]
POLL_S = 0.1
COMMAND_TIMEOUT_S = 120.0
_LAST_CHARACTERS = 3000


def environment(folder: Path) -> dict[str, str]:
    """This process's environment with data and temporary files below ``folder``; one thread per library."""
    own = {"XDG_DATA_HOME": folder / "xdg", "TMPDIR": folder / "tmp", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def swarm(*arguments: object, env: Mapping[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command of `swarm` to its end."""
    command = [*CLI, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=COMMAND_TIMEOUT_S)


def swarm_json(*arguments: object, env: Mapping[str, str]) -> Any:
    """What a command that must succeed prints with ``--json``."""
    done = swarm(*arguments, "--json", env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_refused(done: subprocess.CompletedProcess[str], exit_code: int, said: str) -> None:
    """The command ended as a person should see it: its exit code, one line of what and why, one of advice."""
    lines = done.stderr.splitlines()
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) >= 2 and lines[-2].startswith("error: ") and lines[-1].startswith("  → "), done.stderr
    assert said in lines[-2], done.stderr


def wait_for(condition: Callable[[], Any], what: str, within_s: float, tell: Callable[[], str] = str) -> Any:
    """Look ten times a second until ``condition`` gives something true, and return that; fail in words otherwise."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:.0f} s: {what}\n{tell()}")
        time.sleep(POLL_S)
    return found


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a running program occupies on the machine: its processes, and the places of its sockets."""

    processes: tuple[psutil.Process, ...]
    sockets: tuple[Path, ...]

    def remains(self) -> list[str]:
        """What of it is still there."""
        alive = [f"process {process.pid}" for process in self.processes if is_alive(process)]
        return alive + [str(path) for path in self.sockets if path.exists()]


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; one that only waits to be reaped has ended."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def footprint(pid: int) -> Footprint:
    """Everything that the process ``pid`` and those below it occupy now."""
    main = psutil.Process(pid)
    processes = (main, *main.children(recursive=True))
    sockets: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            addresses = [str(connection.laddr) for connection in process.net_connections("unix")]
            sockets |= {Path(address) for address in addresses if address.startswith("/")}
            flags = [word.partition("=") for word in process.cmdline()]
            sockets |= {Path(value) for name, _, value in flags if name == "--socket-dir"}
    return Footprint(processes, tuple(sorted(sockets)))


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock of ``path``."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class Program:
    """A `swarm` command that runs for long and says what happens as JSON lines."""

    def __init__(
        self, arguments: Sequence[object], folder: Path, env: Mapping[str, str], inside: Sequence[str] = ()
    ) -> None:
        """``inside``: what it is started with, to run in a network namespace."""
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._errors = folder / "out.jsonl", folder / "errors.txt"
        self.temporary = Path(env["TMPDIR"])
        with open(self._out, "wb") as out, open(self._errors, "wb") as errors:
            self._popen = subprocess.Popen(
                [*inside, *CLI, *map(str, arguments), "--json"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=env,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def news(self) -> list[dict[str, Any]]:
        """Everything said so far; a line that is still being written waits."""
        whole = self._out.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [news for news in self.news if news["event"] == kind]

    @property
    def commits(self) -> list[dict[str, Any]]:
        return self.of_kind("commit")

    @property
    def round(self) -> int:
        """The newest round that this peer has applied, or started from."""
        return max((news["round"] for news in self.news if news["event"] in ("ready", "commit")), default=-1)

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def wait_news(self, kind: str, within_s: float, where: Callable[[dict[str, Any]], bool] = bool) -> dict[str, Any]:
        """The first news of ``kind`` for which ``where`` holds."""

        def found() -> dict[str, Any] | None:
            told = next((news for news in self.of_kind(kind) if where(news)), None)
            assert told is not None or self.is_running, self.last_words()
            return told

        told: dict[str, Any] = wait_for(found, f"news of kind {kind!r}", within_s, self.last_words)
        return told

    def last_words(self) -> str:
        errors = self._errors.read_text(errors="replace")[-_LAST_CHARACTERS:]
        said = self._out.read_text(errors="replace")[-_LAST_CHARACTERS:]
        return f"exit code {self._popen.poll()}; said last:\n{said}\nerrors:\n{errors}"

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def footprint(self) -> Footprint:
        return footprint(self.pid)

    def kill(self) -> None:
        """SIGKILL to the main process alone, as when memory runs out."""
        self._popen.kill()
        self._popen.wait(10)

    def leave(self, number: signal.Signals, within_s: float) -> int:
        """Send a signal and wait; the exit code."""
        self._popen.send_signal(number)
        return self.wait_exit(within_s)

    def wait_exit(self, within_s: float) -> int:
        try:
            return self._popen.wait(within_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {within_s:.0f} s\n{self.last_words()}") from error

    def ask_to_end(self) -> Footprint | None:
        """SIGTERM where it still runs; what it occupied then."""
        if not self.is_running:
            return None
        occupied = self.footprint()
        self._popen.terminate()
        return occupied

    def make_end(self, occupied: Footprint | None) -> None:
        """Wait a little, then kill; no process of this program is left."""
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(10)
        for process in occupied.processes if occupied is not None else ():
            with contextlib.suppress(psutil.Error):
                if is_alive(process):
                    process.kill()


def end_all(programs: Sequence[Program]) -> None:
    """Whatever happened: nothing of ``programs`` is left. All are asked first, so that they end side by side."""
    occupied = [program.ask_to_end() for program in programs]
    for program, place in zip(programs, occupied, strict=True):
        program.make_end(place)
