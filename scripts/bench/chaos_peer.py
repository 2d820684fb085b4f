"""A peer of the run under faults: real libp2p, disk, votes and rounds; only its training is a count of tokens.

Started again it goes on from its own disk, as a volunteer's process does. It is told how many tokens to train, and
tells each round that it holds applied and on its disk, as one line of JSON; it judges nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from averaging_ours import DISK_BYTES, Watch, genesis_of, identity_of, member_of, open_place, spec_of
from averaging_place import Place, settle_in
from chaos_account import STEP

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import HolderBook
from peer.p2p.network import Network
from peer.rounds.answering import answer_peers
from peer.rounds.blocks import BLOCK_VALUES
from peer.rounds.catch_up import Newcomer, obtain_state
from peer.rounds.exchange import Exchange
from peer.rounds.exchange_parts import Committed, ExchangeParts
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.planning import SLICE_VALUES
from peer.rounds.shard import Shard
from swarm.log import LogHead, genesis_head
from swarm.proto.common_pb2 import Genesis
from swarm.run_spec import RunSpec

# As joining has it: six intervals, at least 10 s.
STATUS_LIFETIME_S = 10.0
STATUS_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What all peers of the run go by."""

    num_values: int
    tokens_per_round: int
    reduce_timeout_s: float
    takeover_timeout_s: float


def multiaddr(place: Place, peer: int, address: str) -> str:
    """Where ``peer`` listens, at the port after that of the one before it."""
    return f"/ip4/{address}/tcp/{place.port - place.index + peer}/p2p/{identity_of(place, peer).peer_id}"


def chaos_peer(orders: Connection, tell: Connection, place: Place, rules: Rules, others: dict[int, str]) -> None:
    """``others``: addresses of peers that are up, in the place's own network."""
    settle_in(place)
    asyncio.run(_live(orders, _Teller(tell, place), place, rules, others))


class _Teller:
    def __init__(self, pipe: Connection, place: Place) -> None:
        self._pipe = pipe
        self._opened: set[int] = set()
        self.peers = {identity_of(place, peer).public_key: peer for peer in range(place.peers)}

    def __call__(self, kind: str, **what: Any) -> None:
        self._pipe.send_bytes(json.dumps({"kind": kind, "at": time.monotonic(), **what}).encode())

    def opened(self, number: int) -> None:
        """This peer has opened a round: told once, however many members hear of it."""
        if number not in self._opened:
            self._opened.add(number)
            self("opened", round=number)


class CountingTrainer:
    """Every token moves every value by `STEP`."""

    def __init__(self, num_values: int, tell: _Teller) -> None:
        self.tokens = self.offered = 0
        self._tell = tell
        self._moved = 0.0
        self._num_values = num_values

    def train(self, tokens: int) -> None:
        self.tokens += tokens
        self._moved += tokens * STEP

    async def snapshot(self) -> tuple[Any, int]:
        self.offered = self.tokens
        self._tell("snapshot", tokens=self.tokens)
        return np.full(self._num_values, self._moved, np.float32), self.tokens

    async def land(self, anchor: np.ndarray, snapshot: Any, round_number: int) -> None:
        self._moved -= float(snapshot[0]) if snapshot is not None else self._moved


async def _live(orders: Connection, tell: _Teller, place: Place, rules: Rules, others: dict[int, str]) -> None:
    network = await open_place(place, tuple(multiaddr(place, peer, address) for peer, address in others.items()))
    trainer = CountingTrainer(rules.num_values, tell)
    exchange = await _stand_up(network, tell, place, rules, trainer)
    member = member_of(exchange, place, STATUS_LIFETIME_S)
    await answer_peers([member])
    owed = [
        -float(exchange.shard.owed(slice(s, s + BLOCK_VALUES))[0]) for s in range(0, rules.num_values, SLICE_VALUES)
    ]
    tell("ready", round=exchange.head.round, owed=owed)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def on_order() -> None:
        try:
            tokens = orders.recv()
        except (EOFError, OSError):
            tokens = 0
        if not tokens:
            return ended.set()
        trainer.train(tokens)
        exchange.behind.set()  # as a trainer's steps do

    loop.add_reader(orders.fileno(), on_order)
    running = asyncio.create_task(member.run())
    stopped = asyncio.create_task(ended.wait())
    try:
        await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            tell("error", error=repr(running.exception()))
    finally:
        loop.remove_reader(orders.fileno())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await network.close()


async def _stand_up(network: Network, tell: _Teller, place: Place, rules: Rules, trainer: CountingTrainer) -> Exchange:
    spec = spec_of(
        place.folder.parent.name,
        place,
        robust="none",  # what is clipped off goes without a trace
        tokens_per_round=rules.tokens_per_round,
        reduce_timeout_s=rules.reduce_timeout_s,
        takeover_timeout_s=rules.takeover_timeout_s,
        status_interval_s=STATUS_INTERVAL_S,
    )
    identity, keys = identity_of(place, place.index), list(tell.peers)
    first = Shard(spec, 0, np.zeros(rules.num_values, np.float32))
    genesis = genesis_of(spec, keys, first)
    chunks = ChunkStore(place.folder / "chunks", DISK_BYTES)
    ledger = Ledger(place.folder / "shard-0", genesis_head(genesis, 0), chunks, LedgerOptions())
    head, shard = ledger.head, first
    if place.begins_anew:
        ledger.save_state(0, first)
    else:
        head, shard = await _own_state(network, ledger, chunks, spec, genesis)

    async def on_commit(committed: Committed) -> None:
        record, shard = committed.record, exchange.shard
        tell(
            "commit",
            round=record.round,
            state_digest=committed.state_digest.hex(),
            counted=committed.counted,
            parts=[
                (p.first_slice, p.num_slices, [(tell.peers[s.peer_key], s.weight_tokens) for s in p.shares])
                for p in record.parts
                if p.digest
            ],
            trained=trainer.tokens,
            uncounted=exchange.replica.tokens,
            offered=trainer.offered,
            anchor=shard.anchor[::SLICE_VALUES].tolist(),
            voters=[tell.peers[key] for key in committed.head.voters],
        )

    parts = ExchangeParts(
        identity=identity,
        transport=Watch(network, tell.opened),
        shard=shard,
        ledger=ledger,
        chunks=chunks,
        founders=tuple(keys),
        trainer=trainer,
        run_blocking=asyncio.to_thread,
        on_commit=on_commit,
    )
    exchange = Exchange(parts, head)
    return exchange


async def _own_state(
    network: Network, ledger: Ledger, chunks: ChunkStore, spec: RunSpec, genesis: Genesis
) -> tuple[LogHead, Shard]:
    """As a volunteer's process does it: from its own disk, unless a donor's state is cheaper."""
    newcomer = Newcomer(
        transport=network,
        ledger=ledger,
        chunks=chunks,
        spec=spec,
        shard=0,
        genesis_digest=genesis.shards[0].state_digest,
        num_values=genesis.shards[0].num_values,
        book=HolderBook(random.Random(network.public_key)),
    )
    return await obtain_state(newcomer, [key for key in genesis.voters if key != network.public_key])
