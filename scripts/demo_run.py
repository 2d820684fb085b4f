"""The demo: the whole road with the public commands, on this machine, with nothing made up.

Decides the story (who joins when, who is killed, what is looked at) and that nothing of it is left running, however it
ends. Leaves commands and processes to `demo_stage`, figures and the judgement about them to `demo_figures`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from demo_figures import (
    Evidence,
    Volunteer,
    claims,
    committed_tokens,
    figures,
    first_shard_tokens_per_s,
    pending_tokens,
    tables,
)
from demo_stage import DemoFailed, Program, Stage, kill

from swarm.cli import output

VOCAB_SIZE = 1024
NOT_TEXT = ("site-packages", "lib-dynload", "__pycache__", "test*", "idlelib", "encodings", "pydoc_data", "config-*")
NAMES = ("anna", "ben", "chloe")
VICTIM, LATECOMER = "ben", "dora"
# Of a model in two shards all but the first volunteer have memory for one only: the whole takes 31 MB, each 18 at most.
MEMORY_OF_A_SPAN = "24MB"
MAX_SHARDS = 2  # as many as the preset has layers
KILL_AFTER_ROUND = 4
PROMPT = "def "
READY_WITHIN_S, TRAINED_WITHIN_S, LEFT_WITHIN_S = 90.0, 600.0, 30.0
STATUS_EVERY_S = 10.0
POLL_S = 0.1
OPEN_IN_A_CLEAN_PROCESS = (
    "import sys; from transformers import AutoModelForCausalLM; "
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
    "print(type(model).__name__, sum(p.numel() for p in model.parameters()), 'parameters')"
)


def main() -> int:
    """The exit code: 0 only where every claim holds."""
    options = _options()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in step with what commands print
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    started = time.monotonic()
    try:
        with Stage(_fresh(options.dir)) as stage:
            evidence = Demo(stage, options.shards).play()
    except DemoFailed as failure:
        print(f"\nthe demo failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; everything that was started has ended", file=sys.stderr)
        return 130
    return _tell(evidence, time.monotonic() - started, options.json)


class Demo:
    """One showing. `play` is the story."""

    def __init__(self, stage: Stage, num_shards: int = 1) -> None:
        self.stage, self.num_shards = stage, num_shards
        self.volunteers: dict[str, Program] = {}
        self.status: dict[str, Any] = {"rounds": [], "peers": []}
        self.status_due = 0.0
        self.killed_at_round = 0
        self.left_behind: list[str] = []

    def play(self) -> Evidence:
        stage = self.stage
        self._prepare_data()
        stage.swarm("init", "run", "--preset", "demo", "--data", "data")
        self._cut_model()
        coordinator = stage.start("organizer", "start", "run/run.toml", "--json")
        stage.name_invite(coordinator.wait_for("started", READY_WITHIN_S)["invite"])
        coordinator.wait_for("seed ready", READY_WITHIN_S)
        for name in NAMES:
            self._join(name)
            if self.num_shards > 1:  # each chooses by what those before it host
                hosts = self.volunteers[name].wait_for("ready", READY_WITHIN_S)["hosts"]
                print(f"{name} hosts {'shard' if len(hosts) == 1 else 'shards'} {', '.join(map(str, hosts))}")
        self._train(coordinator)
        self.status = stage.swarm_json("status", "$INVITE")
        stage.swarm("checkpoints", "$INVITE")
        stage.swarm("download", "$INVITE", "--out", "checkpoints")
        folder = max((stage.folder / "checkpoints").glob("round-*"))
        checkpoint = stage.swarm_json("verify", folder.relative_to(stage.folder), "--run", "$INVITE")
        print(f"every byte and signature is right; state digest {checkpoint['state_digest']}")
        opened = stage.run([sys.executable, "-I", "-c", OPEN_IN_A_CLEAN_PROCESS, str(folder)])
        print(opened)
        stage.swarm("generate", folder.relative_to(stage.folder), PROMPT, "--seed", "1", "--temperature", "0.6")
        coordinator.leave(LEFT_WITHIN_S)
        return Evidence(
            status=self.status,
            checkpoint={**checkpoint, "folder": str(folder)},
            opened=opened,
            volunteers=[
                Volunteer(name=name, news=program.news, exit_code=program.exit_code)
                for name, program in self.volunteers.items()
            ],
            seed_news=coordinator.news,
            victim=VICTIM,
            killed_at_round=self.killed_at_round,
            latecomer=LATECOMER,
            left_behind=self.left_behind,
        )

    def _prepare_data(self) -> None:
        library, text = Path(os.__file__).parent, self.stage.folder / "text"
        files = copy_sources(library, text)
        size = sum(path.stat().st_size for path in files)
        print(f"text: {len(files)} files of {library}, {size / 1e6:.1f} MB, copied to {text}")
        self.stage.swarm(
            *("data", "prepare", "text", "--out", "data", "--vocab-size", str(VOCAB_SIZE), "--licence", "PSF-2.0")
        )

    def _cut_model(self) -> None:
        path = self.stage.folder / "run" / "run.toml"
        if self.num_shards > 1:
            print(f"$ sed -i 's/^num_shards = 1/num_shards = {self.num_shards}/' run/run.toml")
            path.write_text(path.read_text().replace("\nnum_shards = 1", f"\nnum_shards = {self.num_shards}"))

    def _join(self, name: str) -> None:
        limits = ("--memory", MEMORY_OF_A_SPAN) if self.num_shards > 1 and name != NAMES[0] else ()
        arguments = ("join", "$INVITE", "--home", name, "--threads", "1", *limits, "--json")
        self.volunteers[name] = self.stage.start(name, *arguments)

    # ---- training -----------------------------------------------------------------------------------------------

    def _train(self, coordinator: Program) -> None:
        """Until every volunteer but the one that is killed has left by itself: the run is over."""
        deadline = time.monotonic() + TRAINED_WITHIN_S
        with output.LiveView("demo") as view:
            while any(program.is_running for program in self.volunteers.values()):
                if time.monotonic() > deadline:
                    raise DemoFailed(f"the run is not over after {TRAINED_WITHIN_S:.0f} s")
                self._hear(coordinator)
                if not self.killed_at_round:
                    self._kill_in_mid_round()
                view.update(self._progress())
                time.sleep(POLL_S)
            self._hear(coordinator)
        failed = [name for name, program in self.volunteers.items() if name != VICTIM and program.exit_code]
        if failed:
            raise DemoFailed(f"{failed[0]}: {self.volunteers[failed[0]].last_words()}")

    def _hear(self, coordinator: Program) -> None:
        """Read what everybody said, and repeat what a spectator wants to know."""
        for name, program in self.volunteers.items():
            for news in program.read_news():
                if news["event"] == "ready":
                    print(f"{name} trains from round {news['round']} on ({news['device']})")
                elif news["event"] == "finished":
                    print(f"{name} is done: the run ended with round {news['round']}, {news['tokens']:,} tokens")
        for news in coordinator.read_news():
            if news["event"] == "seed checkpoint":
                print(f"a checkpoint of round {news['round']} is published and signed")

    def _kill_in_mid_round(self) -> None:
        """SIGKILL one volunteer when the tokens of a round are trained and its exchange is about to begin."""
        programs = list(self.volunteers.values())
        first = [program for program in programs if 0 in program.last("ready").get("hosts", [0])]
        commits = [[news for news in program.of("commit") if news["shard"] == 0] for program in first]
        if min(len(seen) for seen in commits) < KILL_AFTER_ROUND:
            return
        before, last = committed_tokens(commits[0])[-2:]
        if pending_tokens([program.news for program in first], time.monotonic()) < last - before:
            return
        self.killed_at_round = commits[0][-1]["round"] + 1
        print(f"\nround {self.killed_at_round} is about to be exchanged: {VICTIM} is killed")
        self.left_behind = kill(self.volunteers[VICTIM])
        self._join(LATECOMER)

    def _progress(self) -> dict[str, object]:
        live = [p for p in self.volunteers.values() if p.is_running and p.last("progress")]
        progress = [program.last("progress") for program in live]
        speeds = [first_shard_tokens_per_s(p) for p in progress if 0 in p.get("hosts", [0])]  # every token passes it
        if time.monotonic() > self.status_due and any(program.of("commit") for program in live):
            self.status = self.stage.swarm_json("status", "$INVITE", quiet=self.status_due > 0)
            self.status_due = time.monotonic() + STATUS_EVERY_S
        losses = [p["loss"] for p in progress if p["loss"] is not None]
        measured = [r["validation loss"] for r in self.status["rounds"] if r["validation loss"] is not None]
        return {
            "round": max((p["round"] for p in progress), default=0),
            "tokens": f"{max((p['committed tokens'] for p in progress), default=0):,}",
            "training loss": f"{sum(losses) / len(losses):.2f}" if losses else "-",
            "validation loss": f"{measured[-1]:.2f}" if measured else "-",
            "tokens/s": f"{sum(speeds):,.0f}",
            "peers": len(live),
        }


def copy_sources(library: Path, target: Path) -> list[Path]:
    """Copy Python sources below ``library``, without tests, tables and installed packages; the files that were made."""
    copies = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not any(fnmatch(part, pattern) for part in relative.parts for pattern in NOT_TEXT):
            copies.append(target / relative)
            copies[-1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copies[-1])
    return copies


def _tell(evidence: Evidence, seconds: float, as_json: bool) -> int:
    for title, columns, rows in tables(evidence):
        print()
        output.table(title, columns, rows)
    print()
    judged = claims(evidence)
    for claim in judged:
        print(f"{'yes' if claim.holds else 'NO '}  {claim.text}")
    print(f"\n{seconds:.0f} s; the checkpoint is in {evidence.checkpoint['folder']}")
    if as_json:
        print(json.dumps({**figures(evidence), "seconds": round(seconds)}))
    return 0 if all(claim.holds for claim in judged) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="The whole road on this machine, for real.")
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder to work in; emptied first")
    parser.add_argument(
        "--shards",
        type=int,
        choices=range(1, MAX_SHARDS + 1),
        default=1,
        help="cut the model into so many, held by volunteers with less memory beside one who holds it whole",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, as the last line")
    return parser.parse_args()


def _fresh(folder: Path) -> Path:
    """An empty folder; one that is there is only removed if it is empty or from an earlier demo."""
    folder = folder.absolute()
    marker = folder / ".swarmtrain-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise SystemExit(f"{folder} holds something else than a demo; name another folder with --dir")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    return folder


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
