"""What a peer tells the coordinator: progress, and commits that it lacks. Never in the way of training.

Decides when to tell; a coordinator that is away is told later, from the log on disk. Nothing waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from peer.rounds.ledger import Ledger
from peer.waiting import wait_for_news
from swarm.errors import NotAdmitted, SwarmError, VerificationError
from swarm.proto.coordinator_pb2 import ReportPayload
from swarm.proto.round_pb2 import Commit

INTERVAL_S = 10.0
MAX_INCIDENT_CHARACTERS = 512
RENEW_INTERVAL_S = 24 * 3600.0
COMMITS_PER_CALL = 32
MAX_COMMITS_OF_BRANCH = 1024

log = logging.getLogger(__name__)


class Coordinator(Protocol):
    async def report(self, report: ReportPayload) -> Sequence[int]: ...
    async def record_commits(self, commits: list[Commit]) -> int: ...


class Reporter:
    """``describe`` fills in what the peer is doing now; losses measured per round wait here until they are told."""

    def __init__(
        self,
        coordinator: Coordinator,
        ledgers: Sequence[Ledger],
        describe: Callable[[], ReportPayload],
        renew: Callable[[], Awaitable[None]],
    ) -> None:
        """``ledgers``: of every shard that is hosted here, in order; ``renew`` asks for admission again."""
        self._coordinator, self._ledgers, self._describe, self._renew = coordinator, ledgers, describe, renew
        self._renewed_at = asyncio.get_running_loop().time()
        self._validation: dict[int, float] = {}
        self._incidents: list[str] = []
        self._news = asyncio.Event()
        self.recorded_round = 0
        """the coordinator has recorded every round of the first shard that is hosted here up to this one"""

    def tell_soon(self) -> None:
        """There is news: do not wait for the interval."""
        self._news.set()

    def met_branch(self, incident: str) -> None:
        """Our branch was given up for another: the organizer should know."""
        self._incidents.append(incident)
        self._news.set()

    def measured(self, round_number: int, validation_loss: float) -> None:
        """Report the loss of the anchor after a round."""
        self._validation[round_number] = validation_loss
        self._news.set()

    async def run(self) -> None:
        """Report at every news and interval, until cancelled."""
        while True:
            await wait_for_news(self._news, INTERVAL_S)
            self._news.clear()
            try:
                await self._renew_when_due()
                await self.tell()
            except NotAdmitted as error:
                log.warning("the coordinator does not admit us any more: %s", error)
                self._renewed_at = -math.inf
            except SwarmError as error:
                log.info("the coordinator was not told: %s", error)

    async def _renew_when_due(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._renewed_at > RENEW_INTERVAL_S:
            await self._renew()
            self._renewed_at = now

    async def tell(self) -> None:
        """Tell everything once. Raises what the call raises."""
        for round_number, loss in list(self._validation.items()):
            payload = self._describe()
            payload.round, payload.validation_loss, payload.train_loss = round_number, loss, math.nan
            payload.state_digest, payload.log_digest = b"", b""
            await self._coordinator.report(payload)
            self._validation.pop(round_number, None)
        wanted = await self._coordinator.report(self._describe())
        hosted = [ledger for ledger in self._ledgers if ledger.head.shard < len(wanted)]
        recorded = [await self._record(ledger, wanted[ledger.head.shard]) for ledger in hosted]
        self.recorded_round = recorded[0] - 1
        await self._tell_incidents()

    async def _record(self, ledger: Ledger, wanted: int) -> int:
        """Hand over one shard's commits from ``wanted`` on; the round that is wanted then."""
        while wanted <= ledger.head.round:
            try:
                following = await self._coordinator.record_commits(ledger.commits(wanted, COMMITS_PER_CALL))
            except VerificationError:
                following = await self._record_branch(ledger, wanted)
            if following <= wanted:
                break
            wanted = following
        return wanted

    async def _record_branch(self, ledger: Ledger, wanted: int) -> int:
        """The coordinator stands on another branch: hand over ours from where the two part, in one call.

        That is looked for by steps that grow. Raises `VerificationError` where the coordinator does not follow ours.
        """
        step = 1
        while True:
            first = max(1, wanted - step)
            try:
                commits = ledger.commits(first, MAX_COMMITS_OF_BRANCH)
                return await self._coordinator.record_commits(commits)
            except VerificationError:
                if first == 1 or step >= MAX_COMMITS_OF_BRANCH:
                    raise
            step *= 4

    async def _tell_incidents(self) -> None:
        while self._incidents:
            payload = self._describe()
            payload.incident, payload.train_loss = self._incidents[0][:MAX_INCIDENT_CHARACTERS], math.nan
            await self._coordinator.report(payload)
            self._incidents.pop(0)
