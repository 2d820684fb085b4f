"""Our side of the race to a loss: coordinator, seed peer and four volunteers, by the public commands, on the links.

Decides how a run is started in the laboratory and what is read from what it says. The clock runs from the first
volunteer that trains to the commit after which the anchor's validation loss, as the volunteers measured it, is as low
as asked. The organizer has a namespace of its own, after those of
the volunteers, with a fast line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from demo_stage import DemoFailed, Program, Stage
from loss_task import Task

from scripts.netlab.lab import Lab
from swarm.run_file import render

READY_WITHIN_S, TRAINED_WITHIN_S, POLL_S = 120.0, 1200.0, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``ends``: whether the run is over after the task's tokens. ``duty_percent``: the largest share of its time that a
    volunteer spends in inner steps."""

    has_rounds: bool
    ends: bool = False
    duty_percent: int = 100


def race(stage: Stage, lab: Lab, task: Task) -> dict[str, Any]:
    """Seconds to the target loss, and tokens/s of a peer while rounds go on; seconds are None where it is missed."""
    coordinator, volunteers = _start(stage, lab, task, "rounds", Options(has_rounds=True, ends=True))
    _until(lambda: not any(program.is_running for program in volunteers), volunteers, TRAINED_WITHIN_S)
    failed = [program for program in volunteers if program.exit_code]
    if failed:
        raise DemoFailed(f"{failed[0].name}: {failed[0].last_words()}")
    status = stage.swarm_json("status", "$INVITE", within=lab.inside(task.peers))
    coordinator.leave(READY_WITHIN_S)
    began = min(program.of("ready")[0]["at_s"] for program in volunteers)
    ended = {news["round"]: news["at_s"] for program in volunteers for news in program.of("commit")}
    losses = [(r["round"], r["validation loss"]) for r in status["rounds"] if r["validation loss"] is not None]
    reached = min((number for number, loss in losses if loss <= task.target_loss), default=None)
    commits = volunteers[0].of("commit")
    return {
        "seconds_to_loss": None if reached is None else round(ended[reached] - began, 2),
        "round": reached,
        "tokens": next((news["committed tokens"] for news in commits if news["round"] == reached), None),
        "curve": [(number, round(ended[number] - began, 1), round(loss, 4)) for number, loss in losses],
        "tokens_per_s": round(sum(map(_speed, volunteers)) / task.peers, 1),
        "sent_bytes": max(program.last("left")["sent bytes"] for program in volunteers),
    }


def speed(stage: Stage, lab: Lab, task: Task, name: str, options: Options) -> float:
    """Tokens/s of a peer, in the mean, over ``task.alone_s``: the same processes, and the same machine."""
    coordinator, volunteers = _start(stage, lab, task, name, options)
    began = time.monotonic()
    _until(lambda: time.monotonic() - began > task.alone_s, volunteers, 2 * task.alone_s + READY_WITHIN_S)
    tokens_per_s = sum(map(_speed, volunteers)) / task.peers
    for program in (*volunteers, coordinator):
        program.leave(READY_WITHIN_S)
    return tokens_per_s


def _start(stage: Stage, lab: Lab, task: Task, name: str, options: Options) -> tuple[Program, list[Program]]:
    """Organizer and volunteers of a run, all of them training."""
    folder = stage.folder / name
    folder.mkdir()
    (folder / "run.toml").write_text(render(task.run_file(name, has_rounds=options.has_rounds, ends=options.ends)))
    organizer = ("start", f"{name}/run.toml", "--host", lab.address(task.peers), "--json")
    coordinator = stage.start(f"{name}-organizer", *organizer, within=lab.inside(task.peers))
    stage.name_invite(coordinator.wait_for("started", READY_WITHIN_S)["invite"])
    coordinator.wait_for("seed ready", READY_WITHIN_S)
    volunteers = []
    for peer in range(task.peers):
        home = stage.folder / f"{name}-{peer}"
        arguments = (
            "join",
            "$INVITE",
            "--home",
            home,
            "--threads",
            "1",
            "--listen",
            f"{lab.address(peer)}:0",
            "--duty",
            str(options.duty_percent),
            "--json",
        )
        volunteers.append(stage.start(f"{name}-{peer}", *arguments, within=lab.inside(peer)))
    _until(lambda: all(program.of("ready") for program in volunteers), volunteers, READY_WITHIN_S)
    return coordinator, volunteers


def _until(done: Callable[[], bool], programs: list[Program], within_s: float) -> None:
    """Read what ``programs`` say until ``done()``. Raises `DemoFailed` where that takes too long, or one has failed."""
    deadline = time.monotonic() + within_s
    while not done():
        for program in programs:
            program.read_news()
            if program.exit_code:
                raise DemoFailed(f"{program.name}: {program.last_words()}")
        if time.monotonic() > deadline:
            raise DemoFailed(f"not done after {within_s:.0f} s")
        time.sleep(POLL_S)
    for program in programs:
        program.read_news()


def _speed(program: Program) -> float:
    """Tokens/s between the first and the last word of progress after the first inner steps."""
    progress = [news for news in program.of("progress") if news["my tokens"]]
    if len(progress) < 2:
        raise DemoFailed(f"{program.name} said too little of its progress")
    first, last = progress[0], progress[-1]
    return float((last["my tokens"] - first["my tokens"]) / (last["at_s"] - first["at_s"]))
