"""A peer of our side in the pipeline benchmark: an 8-bit replica of its span at its place, over libp2p.

A whole model is a peer without a network. Leaves what is measured to `pipeline`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from multiprocessing.connection import Connection
from typing import Any

import torch
from averaging_ours import identity_of, open_place, serve_side
from averaging_place import Place as Seat
from pipeline_task import Task, hold_to
from quality_setting import VOCAB

from peer.pipeline.messages import HopRules
from peer.pipeline.place import Place, PlaceParts
from peer.training import model
from peer.training.int8_replica import Int8Replica
from peer.training.trainer import Limits


def ours(pipe: Connection, seat: Seat, task: Task) -> None:
    hold_to(task.cpu_share, f"ours-{seat.index}")
    # Peers end in the middle of each other's calls; asyncio of 3.11 complains of streams whose tasks were cancelled.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    serve_side(pipe, seat, _Side(seat, task), ("begin", "prepare", "measure", "end"))


class _Side:
    """The peer with number ``seat.index`` hosts the shard with that number; of one peer, all."""

    def __init__(self, seat: Seat, task: Task) -> None:
        self._seat, self._task = seat, task
        self._network: Any = None
        self._place: Any = None
        self._tokens = 0

    async def begin(self, meet: str) -> dict[str, Any]:
        if self._seat.peers > 1:
            self._network = await open_place(self._seat, (meet,) if meet else ())
        return {"meet": self._network.addresses[0] if self._network else "none"}

    async def prepare(self, meets: list[str]) -> dict[str, Any]:
        """Build the replica and take the place in the pipeline; ``meets``: every peer's address."""
        seat, task = self._seat, self._task
        shards = task.shards(seat.peers)
        config, spec = task.config(), task.spec()
        built = model.build_span(config, shards[seat.index])
        replica = Int8Replica(built, model.layout_of(built), spec.inner, torch.device("cpu"), seed=seat.index)
        replica.load(model.initial_anchor(config, 0, shards[seat.index]))
        keys = [identity_of(dataclasses.replace(seat, index=i), i).public_key for i in range(seat.peers)]
        is_last = seat.index + 1 == seat.peers
        self._place = Place(
            PlaceParts(
                replica=replica,
                transport=self._network,
                rules=HopRules(
                    sequence_length=task.length,
                    max_sequences=task.sequences,
                    width=task.hidden,
                    vocab_size=VOCAB,
                ),
                first_shard=seat.index,
                next_shard=None if is_last else seat.index + 1,
                step_microbatches=task.step_microbatches,
                max_in_flight=task.max_in_flight,
                learning_rate=lambda: 1e-3,
                hosts=lambda shard: {keys[shard]: (meets[shard],)},
                is_admitted=lambda key: key in keys,
                limits=Limits(num_threads=1),
                next_batch=task.batch if seat.index == 0 else None,
                on_answer=self._count,
            )
        )
        await self._place.begin()
        return {}

    async def measure(self, seconds: float) -> dict[str, Any]:
        """What happened in a window of so many seconds."""
        loop, place = asyncio.get_running_loop(), self._place
        began_s, tokens, computed_s = loop.time(), self._tokens, place.slot.computed_s
        sent = self._network.traffic()[0] if self._network else 0
        await asyncio.sleep(seconds)
        for job in place.jobs:
            if job.done():
                job.result()
        return {
            "seconds": loop.time() - began_s,
            "tokens": self._tokens - tokens,
            "computed_s": place.slot.computed_s - computed_s,
            "sent_bytes": (self._network.traffic()[0] if self._network else 0) - sent,
        }

    async def end(self) -> dict[str, Any]:
        if self._place is not None:
            await self._place.end()
            self._place = None
        if self._network is not None:
            await self._network.close()
            self._network = None
        return {}

    def _count(self, tokens: Any, answer: Any) -> None:
        self._tokens += tokens[:, 1:].size
