"""A peer's life, as a page: join, catch up, train, make rounds, leave. The page to read first.

A volunteer trains; a seed peer is the same program without a trainer: it keeps the whole log, serves token shards,
publishes checkpoints, and does not end by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peer.home import locked_identity
from peer.hosted import HostedShards, Listeners
from peer.joining import (
    Entry,
    Joined,
    PeerOptions,
    join,
    measure,
    meet_coordinator,
    own_addresses,
)
from peer.p2p.fetch import fetch_chunk
from peer.placing import Mover, SpanMoved
from peer.removing import RemovalWatch
from peer.reporting import Reporter
from peer.rounds.exchange_parts import Committed, tell_verdicts
from peer.rounds.member import Words
from peer.rounds.mending import Incident
from peer.spanning import span_trainer
from peer.starting import Start, backfill_of, find_holders, find_start
from peer.states import States
from peer.telling import Telling, prediction
from peer.token_mirror import TokenMirror
from peer.training import device
from peer.training.data import ReaderOptions, TokenReader
from peer.training.feeding import Build, Training
from peer.training.hosting import build_replica
from peer.training.trainer import Trainer
from peer.waiting import wait_for_news
from swarm.errors import DivergedError, NetworkError, SwarmError
from swarm.identity import Identity

if TYPE_CHECKING:
    from peer.pipeline.trainer import HostedReplica

LEAVE_TIMEOUT_S = 3.0
TRAINER_STOP_S = 5.0
PROGRESS_INTERVAL_S = 1.0
CHECKPOINT_WAIT_S = 90.0
FETCH_TIMEOUT_S = 60.0
MAX_DIVERGENCES = 3
JOIN_AGAIN_S = 15.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What happened last.

    ``kind``: joining, hosting, ready, progress, commit, incident, checkpoint, finished, moving or left.
    """

    kind: str
    values: dict[str, Any]


Watch = Callable[[News], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """Whether this process has taken part already, and how fast it was then, as far as that was measured."""

    lived: bool = False
    work_per_s: float = 0.0


async def run_peer(options: PeerOptions, stop: asyncio.Event, watch: Watch) -> None:
    """Take part until the run is finished or ``stop`` is set; then leave cleanly."""
    if options.trains:
        device.choose(options.device)  # a missing one is told before anything is fetched
    with locked_identity(options.home) as identity:
        divergences, before = 0, Before()
        while divergences < MAX_DIVERGENCES:
            try:
                if await _take_part(options, identity, stop, watch, before):
                    return
                await wait_for_news(stop, JOIN_AGAIN_S)
            except SpanMoved as moved:
                before = Before(lived=True, work_per_s=moved.work_per_s)
                watch(News(kind="moving", values={"reason": str(moved)}))
            except DivergedError as error:
                divergences, before = divergences + 1, Before(lived=True)
                logger.error("%s; joining again with the state that the log proves", error)
        raise DivergedError(
            f"this replica diverged from the run {MAX_DIVERGENCES} times",
            "its memory or disk may be faulty: move its folder away, test the machine, then join again",
        )


async def _take_part(
    options: PeerOptions, identity: Identity, stop: asyncio.Event, watch: Watch, before: Before
) -> bool:
    """False where it cannot join again yet. Where it never did, what is wrong is raised: somebody looks then."""
    async with AsyncExitStack() as stack:
        joining = asyncio.create_task(_join(options, identity, watch, stack, before))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({joining, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not joining.done():
                return True
            peer = joining.result()
        except NetworkError as error:
            if not before.lived:
                raise
            logger.warning("%s; joining again in %.0f s", error, JOIN_AGAIN_S)
            return stop.is_set()
        finally:
            joining.cancel()
            stopping.cancel()
            await asyncio.gather(joining, stopping, return_exceptions=True)
        await peer.live(stop)
    return True


async def _join(options: PeerOptions, identity: Identity, watch: Watch, stack: AsyncExitStack, before: Before) -> Peer:
    client, run = await meet_coordinator(options, identity, stack)
    hosting = await measure(options, run) if options.trains else None
    told = {"peer id": identity.peer_id, "spec": run.spec, "options": options, "hosting": hosting}
    watch(News(kind="joining", values=told))
    entry = Entry(
        options=options, identity=identity, client=client, run=run, hosting=hosting, work_per_s=before.work_per_s
    )
    joined = await join(entry, stack)
    if joined.hosting is not None and run.spec.num_shards > 1:
        hosts = list(joined.hosting.span.shards)
        told = {"shards": hosts, "reason": joined.reason, **prediction(joined)}
        watch(News(kind="hosting", values=told))
    return Peer(joined, await find_start(joined), watch)


class Peer:
    def __init__(self, joined: Joined, start: Start, watch: Watch) -> None:
        self.joined, self.watch, hosting = joined, watch, joined.hosting
        self.spec, self.transport = joined.run.spec, joined.transport
        threads = joined.options.limits.num_threads
        self.device = device.describe(hosting.device, threads) if hosting is not None else "none"
        self.training = self._build_training() if joined.options.trains else None
        organizer_key = bytes.fromhex(self.spec.organizer_key)
        self.removals = RemovalWatch(joined.client, self.training, self.spec.run_id, organizer_key, joined.folder)
        self.words = Words(
            trains=joined.options.trains, upload_bps=joined.options.first_upload_bps, admission=joined.papers.admission
        )
        listeners = Listeners(on_commit=self._on_commit, on_incident=self._on_incident)
        self.hosted = HostedShards(joined, start.shards, self.training, self.words, listeners)
        mirrors = joined.options.mirrors
        self.mirror = TokenMirror(joined.folder, joined.manifest, self._fetch_token_shard) if mirrors else None
        backfill = backfill_of(joined, self.hosted.exchanges) if not joined.options.trains else None
        self.telling = Telling(
            joined=joined,
            backfill=backfill,
            hosted=self.hosted,
            training=self.training,
            mirror=self.mirror,
            words=self.words,
            device=self.device,
        )
        self.reporter = Reporter(joined.client, joined.ledgers, self.telling.report, self._renew_admission)
        self.states = States(joined, self.hosted, start, self.reporter, self._on_checkpoint)
        self.seed_jobs = [job.run for job in (self.mirror, backfill) if job is not None]
        self._finished = asyncio.Event()

    # ---- life ---------------------------------------------------------------------------------------------------

    async def live(self, stop: asyncio.Event) -> None:
        """Serve, train and make rounds, until the run ends or the person does."""
        self.words.checkpoint_round = self.states.resume()
        await self._start_training()
        await self.hosted.serve()  # last: from here on others may open rounds with us
        state = self.hosted.state_digest.hex()
        ready = {"round": self.hosted.round, "device": self.device, "state digest": state, "hosts": self.hosted.shards}
        self.watch(News(kind="ready", values=ready))
        jobs: list[asyncio.Task[Any]] = [
            asyncio.create_task(job)
            for job in (
                stop.wait(),
                self._see_the_run_off(),
                *self.hosted.jobs(),
                self.reporter.run(),
                *self.states.jobs(),
                self.transport.watch(),
                self._tell_progress(),
                self.removals.run(),
                self._watch_trainer(),
                self._consider_moves(),
                *(run() for run in self.seed_jobs),
            )
        ]
        self._consider_end()
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._leave([*jobs, *self.states.beside])

    async def _start_training(self) -> None:
        training, hosting = self.training, self.joined.hosting
        if training is None or hosting is None:
            return
        self.removals.resume()
        await self.removals.look()
        replica = await asyncio.to_thread(build_replica, hosting, self.spec, self.joined.identity.public_key)
        anchors = [exchange.shard.anchor for exchange in self.hosted.exchanges]
        alone = self.spec.num_shards == 1
        build: Build[HostedReplica] = Trainer if alone else span_trainer(self.joined, self.hosted, training)
        await training.start(replica, anchors, self.hosted.first.head, self._on_bad_steps, build)
        await self.states.begin(training)

    async def _see_the_run_off(self) -> None:
        """Return when the run is over and its last checkpoint is published (or that took too long)."""
        await self._finished.wait()
        last = self.hosted.round
        await self.states.ended()
        if self.training is not None:
            self.training.trainer.pause()
        waited = 0.0
        while waited < CHECKPOINT_WAIT_S:
            try:
                await self.reporter.tell()
                if (
                    any(info.round >= last for info in await self.joined.client.checkpoints())
                    and not self.states.beside
                ):
                    break
            except SwarmError as error:
                logger.info("the last checkpoint is not seen yet: %s", error)
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            waited += PROGRESS_INTERVAL_S
        self.watch(News(kind="finished", values={"round": last, "tokens": self.hosted.first.head.total_tokens}))
        if self.training is None:
            await asyncio.Event().wait()  # a seed peer goes on serving

    async def _leave(self, tasks: list[asyncio.Task[Any]]) -> None:
        """Tell the others, stop the trainer, end every task: all within 10 s."""
        self.words.leaving = True
        with contextlib.suppress(SwarmError, asyncio.TimeoutError, TimeoutError):
            told = asyncio.gather(self.hosted.leave(), self.reporter.tell())
            await asyncio.wait_for(told, LEAVE_TIMEOUT_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.training is not None:
            with contextlib.suppress(SwarmError):
                await self.training.stop(TRAINER_STOP_S)
        self.watch(News(kind="left", values=self.telling.values()))

    # ---- events -------------------------------------------------------------------------------------------------

    async def _on_commit(self, shard: int, committed: Committed) -> None:
        record, head = committed.record, committed.head
        contributors = {share.peer_key for part in record.parts for share in part.shares}
        if shard == self.hosted.shards[0] and self.training is not None:
            self.training.follow(head)
        await self.states.committed(shard, contributors, self.training)
        values = self.telling.values() | {
            "shard": shard,
            "round": head.round,
            "committed tokens": head.total_tokens,
            "counted": committed.counted,
            "contributors": len(contributors),
            "absent parts": sum(1 for part in record.parts if not part.digest),
            "state digest": committed.state_digest.hex(),
        }
        verdicts = tell_verdicts(committed, self.joined.identity.public_key)
        for kind in ("refused", "rejected"):
            if kind in verdicts:
                logger.warning("round %d: %s: %s", head.round, kind, verdicts[kind])
                self.watch(News(kind=kind, values={"round": head.round, "reason": verdicts[kind]}))
        values |= verdicts
        self.watch(News(kind="commit", values=values))
        self.reporter.tell_soon()
        self._consider_end()

    def _on_incident(self, shard: int, incident: Incident) -> None:
        head = self.hosted.exchange_of(shard).head
        if shard == self.hosted.shards[0] and self.training is not None:
            self.training.follow(head)
        self.watch(News(kind="incident", values={"shard": shard, "round": head.round, "reason": str(incident)}))
        self.reporter.met_branch(str(incident))

    def _on_checkpoint(self, round_number: int) -> None:
        self.words.checkpoint_round = max(self.words.checkpoint_round, round_number)
        self.watch(News(kind="checkpoint", values={"round": round_number}))

    def _on_bad_steps(self, count: int) -> None:
        logger.warning("%d inner steps in a row were not finite; starting again from the anchor", count)
        self.states.do_beside(self.hosted.reset_replica())

    def _consider_end(self) -> None:
        if self.hosted.is_finished:
            self._finished.set()

    # ---- what others are told -----------------------------------------------------------------------------------

    async def _tell_progress(self) -> None:
        while True:
            self.telling.refresh_words()
            self.transport.learn_seeds(self.joined.client.seed_addresses)
            self.watch(News(kind="progress", values=self.telling.values()))
            self._consider_end()  # the shards elsewhere may have been the last
            await asyncio.sleep(PROGRESS_INTERVAL_S)

    async def _consider_moves(self) -> None:
        """Until another span is worth a move: then we leave, and join again where we help most."""
        if self.training is None or self.joined.hosting is None or self.hosted.is_whole:
            await asyncio.Event().wait()
            return
        mover = Mover(self.joined.hosting, self.hosted.surroundings.everywhere, self.joined.identity.public_key)
        rules, ask = self.joined.status_rules, self.joined.client.progress
        raise await mover.decide(lambda: self.words.service_tokens_per_s, self.joined.clock, rules, ask)

    async def _watch_trainer(self) -> None:
        if self.training is None:
            await asyncio.Event().wait()
            return
        await self.training.failed.wait()
        raise self.training.failure or self.training.trainer.failure or SwarmError("training ended")

    async def _renew_admission(self) -> None:
        addresses = own_addresses(self.joined.options, self.transport)
        self.words.admission = await self.joined.client.admit(None, addresses, self.joined.options.name)
        self.joined.papers.admission = self.words.admission

    async def _fetch_token_shard(self, key: bytes, size: int) -> bytes:
        holders = list(dict.fromkeys([*self.joined.founders, *self.hosted.live_peers]))
        try:
            return await fetch_chunk(self.transport, key, size, holders, FETCH_TIMEOUT_S, self.joined.book)
        except NetworkError:
            await find_holders(self.joined)  # connects to the seed peers again
            raise

    # ---- building -----------------------------------------------------------------------------------------------

    def _build_training(self) -> Training:
        options = ReaderOptions(
            sequence_length=self.spec.data.sequence_length,
            cache=self.joined.folder / "tokens",
            max_cache_bytes=max(1 << 28, self.joined.options.disk_bytes // 2),
        )
        reader = TokenReader(self.joined.manifest, options, self._fetch_token_shard)
        reads = self.joined.ledgers[0].head.shard == 0  # later spans are sent what they train on
        return Training(self.spec, self.joined.identity.public_key, reader, self.joined.options.limits, reads=reads)
