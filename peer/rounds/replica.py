"""A replica between two commits: what it trained, what it offers in a round, what a commit counted, what it owes.

Decides from which moment its movement counts, and that none of it counts twice; leaves arithmetic to
`peer.rounds.shard`, inner steps to the trainer, and when all this happens to `peer.rounds.exchange`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from peer.rounds.codec import Float32
from peer.rounds.exchange_parts import ExchangeParts
from peer.rounds.mending import Debt
from peer.rounds.round_actions import Apply, HandOver, Offered, TakeSnapshot
from peer.rounds.shard import ReplicaSnapshot, Settling, Shard
from peer.training.movement import Movement
from swarm import schedule
from swarm.files import Kept
from swarm.log import LogHead, tokens_by_peer
from swarm.proto.round_pb2 import Part

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Difference:
    """What an anchor moved, made on demand."""

    now: Float32
    start: Float32

    def __len__(self) -> int:
        return len(self.now)

    def __getitem__(self, values: slice) -> Float32:
        return np.subtract(self.now[values], self.start[values])


class Replica:
    def __init__(self, parts: ExchangeParts, at_work: asyncio.Lock) -> None:
        """``at_work``: held by whoever has a part of the shard decoded in memory."""
        self._shard, self._trainer = parts.shard, parts.trainer
        self._me, self._blocking = parts.identity.public_key, parts.run_blocking
        self._at_work = at_work
        self._uncounted_from = parts.trainer.tokens if parts.trainer is not None else 0
        self._snapshot: ReplicaSnapshot | None = None
        self._lock = asyncio.Lock()

    @property
    def tokens(self) -> int:
        """Tokens trained here that no commit has counted yet."""
        return self._trainer.tokens - self._uncounted_from if self._trainer is not None else 0

    async def offer(
        self, is_current: Callable[[], bool], choose_codec: Callable[[], str], max_weight_tokens: int
    ) -> ReplicaSnapshot | None:
        """One snapshot per round: a later attempt offers the same, so that no movement can be counted twice.

        ``is_current`` False: the round that it is for is over. None: nothing to contribute.
        """
        async with self._lock:
            if self._snapshot is None and self._trainer is not None and is_current():
                codec = choose_codec()
                movement, tokens = await self._trainer.snapshot()
                uncounted = min(tokens - self._uncounted_from, max_weight_tokens)
                snapshot = await self._blocking(lambda: self._shard.offer(movement, uncounted, codec))
                if snapshot is None:
                    log.warning("the replica is not finite; nothing to contribute")
                # A commit may have landed meanwhile: then this snapshot is of a round that is over.
                self._snapshot = snapshot if is_current() else None
        return self._snapshot

    async def encode(
        self,
        snapshot: ReplicaSnapshot | None,
        action: TakeSnapshot,
        keep: Callable[[bytes], Kept],
        is_wanted: Callable[[], bool],
        choose_owed: Callable[[str, Sequence[int]], Collection[int]],
    ) -> Offered | None:
        """What an attempt gets of ``snapshot``, and of what we owe as a reducer; None once it is wanted no more.

        ``choose_owed``: of which parts that is handed over, by the codec of ``snapshot`` and what each part's takes.
        """
        encoded, norms, owed = list[Kept](), list[tuple[float, float]](), list[HandOver | None]()
        if snapshot is not None and not snapshot.tokens:
            snapshot = None
        debt, parts = self._shard.reducer_debt, action.open.parts
        is_ours = [action.open.members[part.reducer].peer_key == self._me for part in parts]
        async with self._at_work:  # and nobody books meanwhile
            sizes = [
                0 if ours else debt.owed_bytes(part.first_slice, part.num_slices)
                for part, ours in zip(parts, is_ours, strict=True)
            ]
        handed_over = choose_owed(snapshot.codec if snapshot is not None else "", sizes)

        def work(index: int, part: Part) -> None:
            if snapshot is not None:
                data, norm_of_it = self._shard.encode_measured(snapshot, part)
                encoded.append(keep(data))
                norms.append(norm_of_it)
            goes = sizes[index] > 0 and index in handed_over
            owed.append(debt.to_hand_over(part.first_slice, part.num_slices) if goes else None)

        for index, part in enumerate(parts):
            async with self._at_work:
                if not is_wanted():
                    return None
                await self._blocking(functools.partial(work, index, part))
        # Not before: an attempt that gets none of it has no share of this process.
        weight, codec = snapshot.offer_to(action.ballot) if snapshot is not None else (0, "")
        return Offered(weight_tokens=weight, codec=codec, encoded=encoded, norms=norms, owed=owed)

    def begin(self) -> None:
        """A new round: whatever was offered in the last is settled."""
        self._snapshot = None

    async def land(self, action: Apply) -> bool:
        """Advance the shared state, then the replica; what the commit did not take is owed. True where it took any."""
        if self._trainer is None:
            await self._blocking(lambda: self._shard.apply(action.record, action.parts))
            return False
        async with self._lock:
            snapshot = self._snapshot
            if snapshot is None:  # we were not in this round: all that we trained stays owed
                movement, _ = await self._trainer.snapshot()
                snapshot = await self._blocking(lambda: self._shard.offer(movement, 0))

        def apply() -> bool:
            settling = Settling(snapshot, self._me) if snapshot is not None else None
            return self._shard.apply(action.record, action.parts, settling)

        async with self._at_work:
            taken = bool(await self._blocking(apply))
        if taken and snapshot is not None:
            counted = tokens_by_peer(action.record).get(self._me, snapshot.tokens)
            self._uncounted_from += min(snapshot.tokens, counted)
        movement_then = None if snapshot is None or snapshot.was_reset else snapshot.movement
        await self._trainer.land(self._shard.anchor, movement_then, action.record.round + 1)
        return taken

    async def move(self, fresh: Shard, debt: Debt | None, head: LogHead) -> None:
        """From a branch that is given up to ``fresh``, the state after ``head``.

        What was trained since our last commit is owed, and so is ``debt``. That may be hundreds of rounds' movement: it
        weighs what one contribution may, and is in one.
        """
        if self._trainer is None:
            return self._shard.become(fresh)
        async with self._lock:
            movement, _ = await self._trainer.snapshot()
            self._snapshot = None
            async with self._at_work:
                finite = await self._blocking(lambda: self._book(movement, debt, head.round))
            self._shard.become(fresh)
            if debt is not None:
                room = schedule.max_weight_tokens(self._shard.spec.rounds, head.round + 1) - self.tokens
                self._uncounted_from -= max(0, min(debt.tokens, room))
            await self._trainer.land(self._shard.anchor, movement if finite else None, head.round + 1)

    def _book(self, movement: Movement, debt: Debt | None, round_number: int) -> bool:
        finite = self._shard.offer(movement, 0) is not None
        owed = [movement] if finite else []
        if debt is not None:
            owed.append(Difference(self._shard.anchor, debt.fork_anchor))
        self._shard.owe(round_number, *owed)
        return finite

    async def reset(self, round_number: int) -> None:
        """Back onto the anchor, with fresh moments; what was offered in this round stays offered."""
        if self._trainer is not None:
            await self._trainer.land(self._shard.anchor, None, round_number)
            if self._snapshot is not None:
                self._snapshot.was_reset = True
