"""Donors and newcomers of the joining benchmark, ours and hivemind's: each a process that answers commands.

Ours are seed peers (nothing trains): the real network, statuses, ledger, state and log; a newcomer obtains its state as
a volunteer does, and replays what it missed in its exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from multiprocessing.connection import Connection
from typing import Any

import hivemind
import psutil
import torch
from averaging_ours import DISK_BYTES, identity_of, member_of, open_place, serve_side
from averaging_place import Place, serve, settle_in
from join_world import DONORS, World

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import HolderBook
from peer.rounds.answering import answer_peers
from peer.rounds.catch_up import Newcomer, obtain_state
from peer.rounds.exchange import Exchange
from peer.rounds.exchange_parts import Committed, ExchangeParts
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.shard import Shard
from swarm.log import LogHead, genesis_head

STATUS_LIFETIME_S = 10.0
PREFIX = "join"


def our_peer(pipe: Connection, place: Place, world: World) -> None:
    serve_side(pipe, place, _Replica(place, world), ("begin", "hold", "meet", "obtain", "replay"))


class _Replica:
    def __init__(self, place: Place, world: World) -> None:
        self._place, self._world = place, world
        self._network: Any = None
        self._exchange: Any = None
        self._state: tuple[LogHead, Shard] | None = None
        self._job: asyncio.Task[None] | None = None
        self._applied = asyncio.Event()

    async def begin(self, meet: str) -> dict[str, Any]:
        self._network = await open_place(self._place, (meet,) if meet else ())
        folder = self._place.folder
        self._chunks = ChunkStore(folder / "chunks", DISK_BYTES)
        head = genesis_head(self._world.genesis, 0)
        self._ledger = Ledger(folder / "shard-0", head, self._chunks, LedgerOptions(archive=True))
        return {"meet": self._network.addresses[0]}

    async def hold(self) -> dict[str, Any]:
        """Be a donor of what is on our disk."""
        genesis = self._world.genesis.shards[0]
        self._state = self._ledger.load_state(self._world.spec, 0, genesis.num_values)
        await self._stand_up()
        await self._until_replayed()
        return {}

    async def meet(self, donors: int) -> dict[str, Any]:
        """Until we are connected to every donor."""
        self._holders = [identity_of(self._place, donor).public_key for donor in range(donors)]
        for holder in self._holders:
            await self._network.connect(holder, (), timeout_s=self._place.timeout_s)
        return {}

    async def obtain(self) -> dict[str, Any]:
        """The log, and the state to start from, whole and verified."""
        genesis = self._world.genesis.shards[0]
        newcomer = Newcomer(
            transport=self._network,
            ledger=self._ledger,
            chunks=self._chunks,
            spec=self._world.spec,
            shard=0,
            genesis_digest=genesis.state_digest,
            num_values=genesis.num_values,
            book=HolderBook(random.Random(0)),
        )
        began = time.monotonic()
        self._state = await obtain_state(newcomer, self._holders)
        return {"seconds": time.monotonic() - began, "round": self._state[0].round}

    async def replay(self) -> dict[str, Any]:
        """The rounds after that state."""
        began = time.monotonic()
        await self._stand_up()
        await self._until_replayed()
        return {"seconds": time.monotonic() - began}

    async def end(self) -> dict[str, Any]:
        if self._job is not None:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)
        if self._network is not None:
            await self._network.close()
        return {}

    async def _stand_up(self) -> None:
        if self._state is None:
            raise RuntimeError("no state to stand on")
        head, shard = self._state

        async def on_commit(committed: Committed) -> None:
            self._applied.set()

        parts = ExchangeParts(
            identity=identity_of(self._place, self._place.index),
            transport=self._network,
            shard=shard,
            ledger=self._ledger,
            chunks=self._chunks,
            founders=tuple(identity_of(self._place, donor).public_key for donor in range(DONORS)),
            trainer=None,
            run_blocking=asyncio.to_thread,
            on_commit=on_commit,
        )
        self._exchange = Exchange(parts, head)
        member = member_of(self._exchange, self._place, STATUS_LIFETIME_S)
        member.parts.words.trains = False
        await answer_peers([member])
        self._job = asyncio.create_task(member.run())

    async def _until_replayed(self) -> None:
        while self._exchange.head.round < self._world.rounds:
            await asyncio.wait_for(self._applied.wait(), self._place.timeout_s)
            self._applied.clear()


def hivemind_peer(pipe: Connection, place: Place, sizes: tuple[int, ...]) -> None:
    """An averager that shares its state, or (the last of the places) only loads one. ``sizes``: values per tensor."""
    settle_in(place)
    held: dict[str, Any] = {}

    def begin(meet: str) -> dict[str, Any]:
        is_donor = place.index < place.peers - 1
        address = [f"/ip4/{place.address}/tcp/0"]
        held["dht"] = hivemind.DHT(host_maddrs=address, initial_peers=[meet] if meet else [], start=True)
        generator = torch.Generator().manual_seed(place.index)
        held["averager"] = hivemind.DecentralizedAverager(
            [torch.randn(size, generator=generator) if is_donor else torch.zeros(size) for size in sizes],
            held["dht"],
            start=True,
            prefix=PREFIX,
            target_group_size=2,
            allow_state_sharing=is_donor,
        )
        return {"meet": str(held["dht"].get_visible_maddrs()[0])}

    def meet(donors: int) -> dict[str, Any]:
        """Until the directory names every donor."""
        deadline = time.monotonic() + place.timeout_s
        while True:
            found = held["dht"].get(f"{PREFIX}.all_averagers", latest=True)
            if found is not None and len(found.value) >= donors:
                return {}
            if time.monotonic() > deadline:
                raise TimeoutError("the directory does not name every donor")
            time.sleep(0.2)

    def obtain() -> dict[str, Any]:
        began = time.monotonic()
        loaded = held["averager"].load_state_from_peers()
        seconds = time.monotonic() - began
        if loaded is None or [tensor.numel() for tensor in loaded[1]] != list(sizes):
            raise RuntimeError("no state was loaded")
        return {"seconds": seconds}

    try:
        serve(pipe, place, {"begin": begin, "meet": meet, "obtain": obtain})
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(0)
