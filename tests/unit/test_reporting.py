"""Reports reach the coordinator when it is there, and wait when it is not."""

from __future__ import annotations

import asyncio
import contextlib
import math
from pathlib import Path

import pytest

from peer.reporting import Reporter
from swarm.errors import NotAdmitted, Unreachable, VerificationError
from swarm.proto.coordinator_pb2 import ReportPayload
from swarm.proto.round_pb2 import Commit, Record
from tests.simulation.virtual_time import run
from tests.unit.test_ledger import fill, open_ledger


class FakeCoordinator:
    def __init__(self) -> None:
        self.away = False
        self.admits = True
        self.reports: list[ReportPayload] = []
        self.recorded = 0
        self.renewals = 0

    async def report(self, report: ReportPayload) -> tuple[int, ...]:
        if self.away:
            raise Unreachable("away")
        if not self.admits:
            raise NotAdmitted("only admitted peers report")
        self.reports.append(report)
        return (self.recorded + 1,)

    async def record_commits(self, commits: list[Commit]) -> int:
        self.recorded += len(commits)
        return self.recorded + 1

    async def renew(self) -> None:
        self.renewals += 1
        self.admits = True


def describe() -> ReportPayload:
    return ReportPayload(round=7, train_loss=2.0, validation_loss=math.nan, sent_unix_ms=1000)


def scenario(tmp_path: Path, rounds: int) -> tuple[FakeCoordinator, Reporter]:
    ledger = open_ledger(tmp_path)
    fill(ledger, rounds)
    coordinator = FakeCoordinator()
    return coordinator, Reporter(coordinator, (ledger,), describe, coordinator.renew)


async def running(reporter: Reporter, seconds: float) -> None:
    task = asyncio.ensure_future(reporter.run())
    await asyncio.sleep(seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_commits_that_the_coordinator_lacks_are_told_from_the_log(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator, reporter = scenario(tmp_path, 70)
        await reporter.tell()
        assert coordinator.recorded == 70 and reporter.recorded_round == 70

    run(main())


def test_nothing_is_lost_while_the_coordinator_is_away(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator, reporter = scenario(tmp_path, 3)
        coordinator.away = True
        reporter.measured(2, 1.5)
        await running(reporter, 60)
        assert not coordinator.reports
        coordinator.away = False
        await running(reporter, 15)
        assert coordinator.recorded == 3
        assert [r.validation_loss for r in coordinator.reports if r.round == 2] == [1.5]

    run(main())


def test_a_peer_that_is_not_admitted_any_more_asks_again(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator, reporter = scenario(tmp_path, 1)
        coordinator.admits = False
        await running(reporter, 40)
        assert coordinator.renewals == 1 and coordinator.reports

    run(main())


class BranchedCoordinator(FakeCoordinator):
    """Has recorded ``apart`` other rounds after ours of ``fork``; follows ours, or refuses it."""

    def __init__(self, fork: int, apart: int, follows: bool) -> None:
        super().__init__()
        self.fork, self.follows = fork, follows
        self.recorded = fork + apart
        self.calls = 0

    async def record_commits(self, commits: list[Commit]) -> int:
        self.calls += 1
        first = Record.FromString(commits[0].record).round
        if first > self.fork + 1 or not self.follows:
            raise VerificationError("the record extends another log")
        self.recorded = first + len(commits) - 1
        return self.recorded + 1


@pytest.mark.parametrize("apart", [1, 5, 40])
def test_a_coordinator_on_another_branch_gets_ours_from_the_fork_on(tmp_path: Path, apart: int) -> None:
    """Wherever the two part, in a few calls."""

    async def main() -> None:
        _, reporter = scenario(tmp_path, 70)
        coordinator = reporter._coordinator = BranchedCoordinator(10, apart, follows=True)
        await reporter.tell()
        assert coordinator.recorded == 70 and coordinator.calls <= 6

    run(main())


def test_a_coordinator_that_does_not_follow_our_branch_is_not_asked_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        _, reporter = scenario(tmp_path, 70)
        coordinator = reporter._coordinator = BranchedCoordinator(10, 5, follows=False)
        with pytest.raises(VerificationError):
            await reporter.tell()
        assert coordinator.calls <= 6

    run(main())


def test_an_incident_is_told_once_and_waits_while_the_coordinator_is_away(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator, reporter = scenario(tmp_path, 1)
        coordinator.away = True
        reporter.met_branch("i" * 1000)
        await running(reporter, 30)
        coordinator.away = False
        await running(reporter, 35)
        assert [report.incident for report in coordinator.reports if report.incident] == ["i" * 512]

    run(main())
