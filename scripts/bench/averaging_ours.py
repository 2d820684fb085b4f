"""A round of this project without training: what `averaging_rivals` is compared with.

libp2p, directory, ledger with fsync, codec, votes and anchor are the real ones; a stub trainer tells its tokens and
offers the movement. A round counts from its opening by the leader until a peer holds it applied and on its disk.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from averaging_place import PATTERN_VALUES, Place, error_of, serve, settle_in, vector

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.network import Network, NetworkConfig, open_network
from peer.rounds.answering import answer_peers
from peer.rounds.exchange import ROUND_METHOD, Exchange
from peer.rounds.exchange_parts import Committed, ExchangeParts
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.member import Member, MemberParts, Words
from peer.rounds.shard import Shard
from peer.rounds.statuses import StatusRules, status_key
from swarm.identity import Identity
from swarm.log import genesis_head
from swarm.proto.common_pb2 import Genesis, ShardGenesis
from swarm.proto.round_pb2 import RoundMessage
from swarm.run_spec import RunSpec

RUN_ID = b"bench-allreduce-run!"
ROUND_TOKENS = 1 << 20
DISK_BYTES = 8 << 30


def ours(pipe: Connection, place: Place) -> None:
    serve_side(pipe, place, _OurSide(place), ("begin", "prepare", "arm", "go", "end"))


def serve_side(pipe: Connection, place: Place, side: Any, names: tuple[str, ...]) -> None:
    """Answer the commands ``names`` with methods of ``side``, on a loop that goes on between them."""
    settle_in(place)
    loop = asyncio.new_event_loop()

    def command(work: Callable[..., Awaitable[dict[str, Any]]]) -> Callable[..., dict[str, Any]]:
        def run(*arguments: Any) -> dict[str, Any]:
            return asyncio.run_coroutine_threadsafe(work(*arguments), loop).result()  # type: ignore[arg-type]

        return run

    async def live() -> None:
        await asyncio.to_thread(serve, pipe, place, {name: command(getattr(side, name)) for name in names})
        await side.end()

    loop.run_until_complete(live())


class StubTrainer:
    """Offers the same movement each round and says the tokens that it was told to."""

    def __init__(self, movement: np.ndarray) -> None:
        self._movement = movement
        self.tokens = 0

    async def snapshot(self) -> tuple[Any, int]:
        return self._movement, self.tokens

    async def land(self, anchor: np.ndarray, snapshot: Any, round_number: int) -> None:
        return None


class Watch:
    """A transport that notes when this peer opened a round, and says so to ``on_open`` (round number)."""

    def __init__(self, network: Network, on_open: Callable[[int], None] = lambda number: None) -> None:
        self._network = network
        self._on_open = on_open
        self.opened = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    async def call(self, peer: bytes, method: str, request: bytes, **keywords: Any) -> bytes:
        is_small = method == ROUND_METHOD and isinstance(request, bytes) and len(request) < 1 << 16
        if is_small and (message := RoundMessage.FromString(request)).WhichOneof("body") == "open":
            self.opened = self.opened or time.monotonic()
            self._on_open(message.round)
        return await self._network.call(peer, method, request, **keywords)


def identity_of(place: Place, peer: int) -> Identity:
    return Identity(f"{place.folder.parent.name}:{peer}".encode().ljust(32, b".")[:32])


def first_voters(keys: list[bytes]) -> list[bytes]:
    """Of an odd number."""
    return sorted(keys)[: len(keys) - 1 + len(keys) % 2]


def genesis_of(spec: RunSpec, keys: list[bytes], shard: Shard) -> Genesis:
    """The run begins at ``shard``."""
    state = ShardGenesis(state_digest=shard.state_digest, num_values=shard.num_values)
    return Genesis(run_id=spec.run_id, voters=first_voters(keys), shards=[state])


def member_of(exchange: Exchange, place: Place, lifetime_s: float) -> Member:
    """The replica around ``exchange``: everybody is a founder, and statuses live for ``lifetime_s``."""
    parts = exchange.parts
    return Member(
        MemberParts(
            identity=parts.identity,
            transport=parts.transport,
            exchange=exchange,
            ledger=parts.ledger,
            chunks=parts.chunks,
            rules=StatusRules(
                run_id=parts.shard.spec.run_id,
                publication_key=bytes(32),
                founders=parts.founders,
                lifetime_s=lifetime_s,
            ),
            words=Words(trains=True, upload_bps=place.upload_bps),
            clock=time.time,
        )
    )


async def open_place(place: Place, initial_peers: tuple[str, ...]) -> Network:
    """The network of a peer at its place, in touch with ``initial_peers``."""
    config = NetworkConfig(
        run_id=RUN_ID,
        clock=time.time,
        directory_keys=(status_key(0),),
        host_maddrs=(f"/ip4/{place.address}/tcp/{place.port}",),
        initial_peers=initial_peers,
    )
    return await open_network(config, identity_of(place, place.index))


class _OurSide:
    """Every peer is a founder, so a majority of up to 7 decides each round; no seed peer gets the averages too."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._network: Network | None = None
        self._watch: Any = None
        self._exchange: Any = None
        self._member: Any = None
        self._job: asyncio.Task[None] | None = None
        self._trainer = StubTrainer(np.zeros(0, np.float32))
        self._commits: asyncio.Queue[tuple[float, Committed]] = asyncio.Queue()

    async def begin(self, meet: str) -> dict[str, Any]:
        self._network = await open_place(self._place, (meet,) if meet else ())
        return {"meet": self._network.addresses[0]}

    async def prepare(self, num_values: int) -> dict[str, Any]:
        """A fresh run of this size on the open network."""
        await self._leave()
        place = self._place
        folder = place.folder / str(num_values)
        shutil.rmtree(folder, ignore_errors=True)
        keys = [identity_of(place, peer).public_key for peer in range(place.peers)]
        spec = spec_of(f"values-{num_values}-{place.folder.parent.name}", place, reduce_timeout_s=place.timeout_s)
        shard = Shard(spec, 0, np.zeros(num_values, np.float32))
        chunks = ChunkStore(folder / "chunks", DISK_BYTES)
        head = genesis_head(genesis_of(spec, keys, shard), 0)
        # The state is written every few rounds, beside the next one: not part of a round.
        ledger = Ledger(folder / "shard-0", head, chunks, LedgerOptions(state_every_rounds=10**6))
        self._trainer = StubTrainer(vector(place.index, num_values))
        self._watch = Watch(self._network)  # type: ignore[arg-type]

        async def on_commit(committed: Committed) -> None:
            self._commits.put_nowait((time.monotonic(), committed))

        parts = ExchangeParts(
            identity=identity_of(place, place.index),
            transport=self._watch,
            shard=shard,
            ledger=ledger,
            chunks=chunks,
            founders=tuple(keys),
            trainer=self._trainer,
            run_blocking=asyncio.to_thread,
            on_commit=on_commit,
        )
        self._exchange = Exchange(parts, head)
        self._member = member_of(self._exchange, place, lifetime_s=30.0)
        await answer_peers([self._member])
        self._job = asyncio.create_task(self._member.run())
        return {}

    async def arm(self) -> dict[str, Any]:
        """Until all peers have each other's words and their connections."""
        deadline = time.monotonic() + self._place.timeout_s
        while len(self._member._connected) < self._place.peers - 1:
            if time.monotonic() > deadline:
                raise TimeoutError("not everybody is connected")
            self._exchange.behind.set()
            await asyncio.sleep(0.1)
        return {}

    async def go(self) -> dict[str, Any]:
        self._watch.opened = 0.0
        self._trainer.tokens += ROUND_TOKENS
        self._exchange.behind.set()
        ended, committed = await asyncio.wait_for(self._commits.get(), self._place.timeout_s)
        average = self._exchange.shard.anchor[:PATTERN_VALUES] / np.float32(committed.record.round)
        return {
            "began": self._watch.opened or None,
            "ended": ended,
            "counted": committed.counted,
            "state_digest": committed.state_digest.hex(),
            "error_of_average": error_of(average, self._place.peers),
        }

    async def end(self) -> dict[str, Any]:
        await self._leave()
        if self._network is not None:
            await self._network.close()
            self._network = None
        return {}

    async def _leave(self) -> None:
        if self._job is not None:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)
        self._job = None
        while not self._commits.empty():
            self._commits.get_nowait()


def spec_of(name: str, place: Place, *, robust: str = "clip_and_drop", **rounds: float | str) -> RunSpec:
    """Plain averaging, so that the anchor is the average; a round opens when every peer has told its tokens."""
    settings = {
        "tokens_per_round": ROUND_TOKENS * place.peers,
        "takeover_timeout_s": 20.0,
        "status_interval_s": 2.0,
        **rounds,
    }
    return RunSpec(
        name=name[:63],
        total_tokens=10**15,
        organizer_key="00" * 32,
        publication_key="11" * 32,
        model={"family": "llama"},
        data={"manifest_digest": "0" * 64, "tokenizer_digest": "0" * 64},
        outer={"learning_rate": 1.0, "momentum": 0.0},
        rounds=settings,
        robust={"rule": robust},
    )
