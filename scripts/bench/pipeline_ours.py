"""A peer of our side in the pipeline benchmark: an 8-bit replica of its span at its place, over libp2p.

A whole model is a peer without a network. A peer that was started before takes its anchor from its disk. Leaves what
is measured to `pipeline` and `churn`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import MutableSequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from averaging_ours import identity_of, open_place, serve_side
from averaging_place import Place as Seat
from pipeline_task import Task, hold_to
from quality_setting import VOCAB

from peer.p2p.hivemind_door import load
from peer.pipeline.messages import Answer, HopRules
from peer.pipeline.place import Place, PlaceParts
from peer.pipeline.steps import Stepped
from peer.training import model
from peer.training.inner_optimizer import code_maps
from peer.training.int8_replica import Int8Replica
from peer.training.trainer import Limits

# What a peer counts, by place in its tally: microbatches but for `LEARNED`, which are tokens of inner steps, and
# `GATHERED`, those that wait for the next one.
READ, ANSWERED, NOT_FINITE, LEARNED, GATHERED = range(5)
NUM_COUNTS = 5
DRAIN_S = 60.0
TALLY_S = 0.1


def preload(task: Task) -> None:
    """Import whatever a peer does, once for all that are forked from here."""
    load(time.time, debug=False)
    code_maps(torch.device("cpu"))
    model.build_span(task.config(), task.shards(1)[0])


def ours(pipe: Connection, seat: Seat, task: Task, tally: MutableSequence[int] | None = None) -> None:
    """``tally``: in memory that outlives the process, where somebody wants it."""
    hold_to(task.cpu_share, f"ours-{seat.index}")
    # Peers end in the middle of each other's calls; asyncio of 3.11 complains of streams whose tasks were cancelled.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    side = _Side(seat, task, [0] * NUM_COUNTS if tally is None else tally)
    serve_side(pipe, seat, side, ("begin", "prepare", "measure", "drain", "end"))


class _Side:
    """The peer with number ``seat.index`` hosts the shard with that number, counted round; of one peer, all."""

    def __init__(self, seat: Seat, task: Task, tally: MutableSequence[int]) -> None:
        self._seat, self._task, self._tally = seat, task, tally
        self._num_shards = seat.peers // task.replicas
        self._shard = seat.index % self._num_shards
        self._network: Any = None
        self._place: Any = None
        self._is_draining = False

    async def begin(self, *meets: str) -> dict[str, Any]:
        if self._seat.peers > 1:
            self._network = await open_place(self._seat, tuple(filter(None, meets)))
        return {"meet": self._network.addresses[0] if self._network else "none"}

    async def prepare(self, meets: list[str]) -> dict[str, Any]:
        """Build the replica and take the place in the pipeline; ``meets``: every peer's address."""
        seat, task = self._seat, self._task
        span = task.shards(self._num_shards)[self._shard]
        config, spec = task.config(), task.spec()
        built = model.build_span(config, span)
        replica = Int8Replica(built, model.layout_of(built), spec.inner, torch.device("cpu"), seed=seat.index)
        replica.load(self._anchor(config, span))
        keys = [identity_of(dataclasses.replace(seat, index=i), i).public_key for i in range(seat.peers)]
        is_last = self._shard + 1 == self._num_shards
        self._place = Place(
            PlaceParts(
                replica=replica,
                transport=self._network,
                rules=HopRules(
                    sequence_length=task.length,
                    max_sequences=task.sequences,
                    width=task.hidden,
                    vocab_size=VOCAB,
                    codec=task.hop_codec,
                ),
                first_shard=self._shard,
                next_shard=None if is_last else self._shard + 1,
                step_microbatches=task.step_microbatches,
                max_in_flight=task.max_in_flight,
                learning_rate=lambda: 1e-3,
                hosts=lambda shard: {keys[i]: (meets[i],) for i in range(shard, seat.peers, self._num_shards)},
                is_admitted=lambda key: key in keys,
                limits=Limits(num_threads=1),
                next_batch=self._next_batch if self._shard == 0 else None,
                on_step=self._stepped,
                on_answer=self._answered,
            )
        )
        await self._place.begin()
        self._place.jobs.append(asyncio.ensure_future(self._tell()))
        return {}

    async def measure(self, seconds: float) -> dict[str, Any]:
        """What happened in a window of so many seconds."""
        loop, place = asyncio.get_running_loop(), self._place
        began_s, answered, computed_s = loop.time(), self._tally[ANSWERED], place.slot.computed_s
        sent = self._network.traffic()[0] if self._network else 0
        await asyncio.sleep(seconds)
        self._raise_failures()
        return {
            "seconds": loop.time() - began_s,
            "tokens": (self._tally[ANSWERED] - answered) * self._task.tokens_per_microbatch,
            "computed_s": place.slot.computed_s - computed_s,
            "sent_bytes": (self._network.traffic()[0] if self._network else 0) - sent,
        }

    async def drain(self) -> dict[str, Any]:
        """Read nothing more, and wait until what was read is answered, for `DRAIN_S` at most."""
        self._is_draining = True
        loop, tally = asyncio.get_running_loop(), self._tally
        ends_s = loop.time() + DRAIN_S
        while tally[READ] > tally[ANSWERED] + tally[NOT_FINITE] and loop.time() < ends_s:
            self._raise_failures()
            await asyncio.sleep(0.05)
        return {"repeated": self._place.source.num_repeated if self._place.source is not None else 0}

    async def end(self) -> dict[str, Any]:
        if self._place is not None:
            await self._place.end()
            self._place = None
        if self._network is not None:
            await self._network.close()
            self._network = None
        return {}

    def _anchor(self, config: Any, span: Any) -> np.ndarray:
        path = self._seat.folder / "anchor.npy"
        if not path.exists():
            np.save(path, model.initial_anchor(config, 0, span))
        anchor: np.ndarray = np.load(path)
        return anchor

    def _next_batch(self, number: int) -> np.ndarray | None:
        if self._is_draining:
            return None
        self._tally[READ] += 1
        return self._task.batch(number)

    def _stepped(self, stepped: Stepped) -> None:
        self._tally[GATHERED] = 0
        self._tally[LEARNED] += stepped.num_tokens

    async def _tell(self) -> None:
        while True:
            self._tally[GATHERED] = self._place.hop.parts.steps.num_gathered * self._task.tokens_per_microbatch
            await asyncio.sleep(TALLY_S)

    def _answered(self, tokens: Any, answer: Answer) -> None:
        self._tally[NOT_FINITE if math.isnan(answer.loss) else ANSWERED] += 1

    def _raise_failures(self) -> None:
        for job in self._place.jobs:
            if job.done():
                job.result()
