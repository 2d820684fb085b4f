"""Commands and processes of the demo: each is printed as a person would type it, then run.

Decides how long-running programs are listened to (their JSON lines, from files) and that all of them end with the
stage, by their own ids. Leaves what is run, and when, to `demo_run`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

SWARM = str(Path(sys.executable).with_name("swarm"))
POLL_S = 0.1
END_WITHIN_S = 12.0
_LAST_CHARACTERS = 2000


class DemoFailed(Exception):
    """Something that the demo shows did not work; the text says what, and what was said last."""


class Program:
    """A `swarm` command that runs beside the demo and says what happens as JSON lines."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process = name, process
        self.news: list[dict[str, Any]] = []
        """everything said so far, each with the time at which it was read (``at_s``, monotonic)"""
        self._log, self._read_bytes = log, 0

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def read_news(self) -> list[dict[str, Any]]:
        """What was said since the last call."""
        with self._log.open("rb") as file:
            file.seek(self._read_bytes)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole) + len(end)
        fresh = [{**json.loads(line), "at_s": time.monotonic()} for line in whole.splitlines()]
        self.news += fresh
        return fresh

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [news for news in self.news if news["event"] == kind]

    def last(self, kind: str) -> dict[str, Any]:
        """The newest news of this kind, or nothing."""
        return next((news for news in reversed(self.news) if news["event"] == kind), {})

    def wait_for(self, kind: str, within_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + within_s
        while not self.last(kind):
            if not self.is_running or time.monotonic() > deadline:
                raise DemoFailed(f"{self.name} said no {kind!r} within {within_s:.0f} s: {self.last_words()}")
            time.sleep(POLL_S)
            self.read_news()
        return self.last(kind)

    def last_words(self) -> str:
        errors = self._log.with_suffix(".errors").read_text(errors="replace")[-_LAST_CHARACTERS:]
        return f"exit code {self.exit_code}\n{errors.strip() or '(it wrote no errors)'}\nmore in {self._log.parent}"

    def family(self) -> list[psutil.Process]:
        """The processes below this one, now."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def leave(self, within_s: float) -> None:
        """Ask for a clean end, and insist on it."""
        print(f"$ kill -TERM {self.process.pid}  # {self.name}")
        family = self.family()
        self.process.terminate()
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired as error:
            raise DemoFailed(f"{self.name} did not leave within {within_s:.0f} s") from error
        if code or _alive(family):
            raise DemoFailed(f"{self.name} did not leave cleanly: {self.last_words()}")

    def ask_to_end(self) -> list[psutil.Process]:
        """Send SIGTERM; the processes that were below this one."""
        family = self.family()
        if self.is_running:
            self.process.terminate()
        return family

    def end(self, family: Sequence[psutil.Process]) -> None:
        """Whatever happened: afterwards no process of this program is left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_WITHIN_S)
        if self.is_running:
            self.process.kill()
            self.process.wait()
        for process in _alive(family):
            with contextlib.suppress(psutil.Error):
                process.kill()


class Stage:
    """A folder to work in, and every program that was started there; a context manager that ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs: list[Program] = []
        self._invite = ""
        # Keys go to the demo's folder, not to the person's own.
        self._environment = {**os.environ, "XDG_DATA_HOME": str(folder / "keys")}
        (folder / "logs").mkdir()
        print(f"$ cd {folder}\n$ export XDG_DATA_HOME=$PWD/keys")

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        # A second Ctrl-C must not leave half of them running.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        families = [program.ask_to_end() for program in reversed(self._programs)]
        for program, family in zip(reversed(self._programs), families, strict=True):
            program.end(family)

    def name_invite(self, invite: str) -> None:
        """From now on ``$INVITE`` stands for ``invite`` in commands, as in a shell."""
        self._invite = invite
        print(f"$ INVITE={invite}")

    def swarm(self, *arguments: object) -> None:
        """Run a command to its end, its output shown. Raises `DemoFailed` where it does not exit with 0."""
        self._show(arguments)
        code = subprocess.call(self._command(arguments), cwd=self.folder, env=self._environment)
        if code:
            raise DemoFailed(f"swarm {arguments[0]} ended with exit code {code}")

    def swarm_json(self, *arguments: object, quiet: bool = False, within: Sequence[str] = ()) -> dict[str, Any]:
        """What a command prints with ``--json``; ``within`` as in `start`."""
        if not quiet:
            self._show((*arguments, "--json"))
        values: dict[str, Any] = json.loads(self.run([*within, *self._command((*arguments, "--json"))]))
        return values

    def run(self, command: Sequence[str]) -> str:
        """What another command prints. Raises `DemoFailed` where it does not exit with 0."""
        if SWARM not in command:
            print(f"$ {shlex.join(command)}")
        done = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise DemoFailed(f"{shlex.join(command[:3])} ended with exit code {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def start(self, name: str, *arguments: object, within: Sequence[str] = ()) -> Program:
        """Start a command that goes on beside the demo. In a session of its own: Ctrl-C reaches it through us.

        ``within``: what it is started by, such as ``ip netns exec NAME``.
        """
        self._show((*arguments, "&"))
        log = self.folder / "logs" / f"{name}.jsonl"
        with log.open("wb") as out, log.with_suffix(".errors").open("wb") as errors:
            process = subprocess.Popen(
                [*within, *self._command(arguments)],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
        self._programs.append(Program(name, process, log))
        return self._programs[-1]

    def _command(self, arguments: Sequence[object]) -> list[str]:
        return [SWARM, *(self._invite if argument == "$INVITE" else str(argument) for argument in arguments)]

    def _show(self, arguments: Sequence[object]) -> None:
        words = [word if word in ("$INVITE", "&") else shlex.quote(word) for word in map(str, arguments)]
        print("$", "swarm", *words, flush=True)


def kill(program: Program, within_s: float = 10.0) -> list[str]:
    """SIGKILL to the main process alone, as when memory runs out; what is left of it and below it after that."""
    family = program.family()
    folders = {Path(word.partition("=")[2]) for process in family for word in _words(process, "--socket-dir=")}
    print(f"$ kill -KILL {program.process.pid}  # {program.name}")
    program.process.kill()
    program.process.wait()
    psutil.wait_procs(family, timeout=within_s)
    remains = [f"process {process.pid}" for process in _alive(family)]
    remains += [str(folder) for folder in sorted(folders) if folder.exists()]
    print(f"{program.name}: {len(family)} processes below it and {len(folders)} socket folders; left: {remains or 0}")
    return remains if family and folders else ["nothing was found below it, so nothing was shown"]


def _words(process: psutil.Process, prefix: str) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return [word for word in process.cmdline() if word.startswith(prefix)]
    return []


def _alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
