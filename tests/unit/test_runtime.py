"""A peer's life: joins again after divergence but not for ever, leaves while joining, serves once it can train."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peer import runtime
from peer.checkpoints.gathering import Gathering
from peer.checkpoints.publishing import StateCopy
from peer.coordinator_client import RunInfo
from peer.home import Home, locked_identity
from peer.joining import Joined, Papers, PeerOptions
from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import HolderBook
from peer.placing import SpanMoved
from peer.rounds.exchange import ROUND_METHOD
from peer.rounds.exchange_parts import Committed
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.shard import Shard
from peer.runtime import MAX_DIVERGENCES, Before, News, Peer, run_peer
from peer.starting import ShardStart, Start
from peer.training import device, model
from peer.training.cut import cut
from swarm.digest import sha256
from swarm.errors import DivergedError, NotFound, Unreachable
from swarm.identity import Identity
from swarm.invite import Invite
from swarm.log import genesis_head
from swarm.proto.common_pb2 import Genesis, ShardGenesis, Signed
from swarm.proto.coordinator_pb2 import ReportPayload
from swarm.proto.round_pb2 import Commit, Record
from swarm.run_spec import RunSpec
from tests.simulation.memory_transport import MemoryNetwork, MemoryTransport
from tests.unit.small_models import small_spec
from tests.unit.test_data_reader import Data

INVITE = Invite(run_id=b"r" * 20, tls_pin=b"t" * 32, addresses=("127.0.0.1:9",))
TOKENIZER = b"{}"
WITHIN_S = 60.0


def make_options(folder: Path) -> PeerOptions:
    return PeerOptions(invite=INVITE, home=Home(folder / "home"), device="cpu")


@pytest.fixture(autouse=True)
def _imported() -> None:
    """What takes seconds to import is there before a clock runs."""
    device.choose("cpu")


def unheard(news: News) -> None:
    pass


def in_time(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main, WITHIN_S)

    asyncio.run(bounded())


# ---- divergence -----------------------------------------------------------------------------------------------------


def diverging(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Each of the first ``times`` lives of a peer ends by divergence, the next well; who lived is told."""
    lives: list[str] = []

    async def live(options: PeerOptions, identity: Any, stop: asyncio.Event, watch: Any, work_per_s: float) -> None:
        lives.append(identity.peer_id)
        assert len(lives) < 100, "for ever"
        if len(lives) <= times:
            raise DivergedError("round 5 starts from another state than ours")
        return True

    monkeypatch.setattr(runtime, "_take_part", live)
    return lives


@pytest.mark.parametrize("times", range(MAX_DIVERGENCES))
def test_a_peer_that_diverged_joins_again_by_itself_with_the_same_key(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = diverging(monkeypatch, times)
    in_time(run_peer(make_options(tmp_path), asyncio.Event(), unheard))
    assert len(lives) == times + 1 and len(set(lives)) == 1


def test_a_peer_that_diverges_again_and_again_ends_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = diverging(monkeypatch, 10**6)
    with pytest.raises(DivergedError, match=f"diverged from the run {MAX_DIVERGENCES} times") as ended:
        in_time(run_peer(make_options(tmp_path), asyncio.Event(), unheard))
    assert len(lives) == MAX_DIVERGENCES and "test the machine" in ended.value.advice


# ---- moving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [SpanMoved("4 tokens/s instead of 3", 7.0), DivergedError("another state")])
def test_a_peer_that_was_here_comes_back_once_the_coordinator_does(
    reason: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its measure goes with it. Of a first time the person is told at once, see below."""
    joins: list[Before] = []

    async def end(stop: asyncio.Event) -> None:
        if len(joins) == 1:
            raise reason

    async def join(options: Any, identity: Any, watch: Any, stack: Any, before: Before) -> Any:
        joins.append(before)
        if len(joins) in (2, 3):
            raise Unreachable("no coordinator answers")
        return SimpleNamespace(live=end)

    monkeypatch.setattr(runtime, "_join", join)
    monkeypatch.setattr(runtime, "JOIN_AGAIN_S", 0.001)
    in_time(run_peer(make_options(tmp_path), asyncio.Event(), unheard))
    assert joins == [Before(), *[Before(lived=True, work_per_s=getattr(reason, "work_per_s", 0.0))] * 3]


def test_whoever_cannot_come_back_leaves_when_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, joins = asyncio.Event(), 0

    async def end(stop: asyncio.Event) -> None:
        raise SpanMoved("another span", 0.0)

    async def join(*joining: Any) -> Any:
        nonlocal joins
        joins += 1
        if joins == 1:
            return SimpleNamespace(live=end)
        asyncio.get_running_loop().call_later(0.01, stop.set)
        raise Unreachable("no coordinator answers")

    monkeypatch.setattr(runtime, "_join", join)
    in_time(run_peer(make_options(tmp_path), stop, unheard))
    assert joins <= 3


# ---- leaving while joining ------------------------------------------------------------------------------------------


def joining(monkeypatch: pytest.MonkeyPatch, join: Callable[[], Coroutine[Any, Any, Any]]) -> list[str]:
    """Joining opens something and then does ``join``; what was closed is told."""
    closed: list[str] = []

    async def opens(options: PeerOptions, identity: Any, watch: Any, stack: AsyncExitStack, work_per_s: float) -> Any:
        async def close() -> None:
            await asyncio.sleep(0)  # as a network's end does
            closed.append("network")

        stack.push_async_callback(close)
        return await join()

    monkeypatch.setattr(runtime, "_join", opens)
    return closed


def test_whoever_leaves_while_joining_leaves_at_once_and_closes_what_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while nobody answers: no error, nothing open, and the key is free for the next start."""
    closed = joining(monkeypatch, asyncio.Event().wait)

    async def main() -> None:
        stop, before = asyncio.Event(), asyncio.all_tasks()
        life = asyncio.create_task(run_peer(make_options(tmp_path), stop, unheard))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not life.done() and closed == []
        stop.set()
        await life
        assert closed == ["network"]
        assert asyncio.all_tasks() == before, "nothing runs on"
        with locked_identity(Home(tmp_path / "home")):
            pass

    in_time(main())


def test_an_error_of_joining_is_told_and_what_was_opened_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise Unreachable("no seed peer")

    closed = joining(monkeypatch, fail)
    with pytest.raises(Unreachable, match="no seed peer"):
        in_time(run_peer(make_options(tmp_path), asyncio.Event(), unheard))
    assert closed == ["network"]


# ---- serving --------------------------------------------------------------------------------------------------------


class Transport(MemoryTransport):
    """In memory, and for ever."""

    seeds: tuple[str, ...] = ()

    async def watch(self) -> None:
        await asyncio.Event().wait()

    def learn_seeds(self, addresses: tuple[str, ...]) -> None:
        assert addresses == Coordinator.seed_addresses


class Coordinator:
    """Takes every report, and publishes nothing."""

    seed_addresses = ("/ip4/127.0.0.1/tcp/7",)

    async def report(self, report: ReportPayload) -> tuple[int, ...]:
        return (0,)

    async def record_commits(self, commits: list[Commit]) -> int:
        return 0

    async def run_record(self, round_number: int) -> bytes:
        raise NotFound("no record")

    async def signed_removals(self) -> Signed | None:
        return None


def make_state(num_shards: int = 1) -> tuple[RunSpec, Data, list[Shard]]:
    """A small run, its data, and its states of round 0."""
    data = Data([1000], [1000])
    named = {
        "tokenizer_digest": sha256(TOKENIZER).hex(),
        "manifest_digest": sha256(data.manifest.canonical_bytes()).hex(),
    }
    spec = small_spec("llama")
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=named), "num_shards": num_shards})
    config = model.build_config(spec, data.manifest.vocab_size)
    anchors = [model.initial_anchor(config, spec.seed, shard.span) for shard in cut(config, num_shards)]
    return spec, data, [Shard(spec, number, anchor) for number, anchor in enumerate(anchors)]


def make_peer(
    folder: Path, transport: Transport, identity: Identity, run_of: tuple[RunSpec, Data, list[Shard]]
) -> Peer:
    """All of a peer but libp2p, the coordinator, and a trainer."""
    spec, data, shards = run_of
    states = [ShardGenesis(state_digest=shard.state_digest, num_values=shard.num_values) for shard in shards]
    genesis = Genesis(run_id=spec.run_id, voters=[identity.public_key], shards=states)
    chunks = ChunkStore(folder / "chunks", 1 << 28)
    starts = tuple(ShardStart(head=genesis_head(genesis, shard.index), shard=shard) for shard in shards)
    run = RunInfo(
        spec=spec,
        signed_spec=Signed(),
        genesis=genesis,
        signed_genesis=Signed(),
        seed_addresses=(),
        manifest_bytes=data.manifest.canonical_bytes(),
        tokenizer_bytes=TOKENIZER,
        clock_offset_s=0.0,
    )
    options = replace(make_options(folder), data_folder=folder, invite=replace(INVITE, run_id=spec.run_id))
    joined = Joined(
        options=options,
        identity=identity,
        client=Coordinator(),  # type: ignore[arg-type]
        run=run,
        manifest=data.manifest,
        clock=time.time,
        transport=transport,  # type: ignore[arg-type]
        papers=Papers(),
        folder=folder,
        chunks=chunks,
        ledgers=tuple(
            Ledger(folder / f"shard-{start.shard.index}", start.head, chunks, LedgerOptions()) for start in starts
        ),
        book=HolderBook(random.Random(0)),
    )
    gathering = Gathering(folder, [shard.num_values for shard in shards])
    return Peer(joined, Start(shards=starts, due=(), gathering=gathering), unheard)


async def until(condition: Callable[[], Any], what: str) -> None:
    for _ in range(int(WITHIN_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {WITHIN_S:.0f} s: {what}")


def test_a_peer_serves_rounds_and_says_that_it_is_here_only_once_its_trainer_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member without a trainer would be waited for by everybody, for nothing."""
    network, identity, run_of = MemoryNetwork(), Identity(b"i" * 32), make_state()

    async def main() -> None:
        building, built, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def start_training(peer: Peer) -> None:
            building.set()
            await built.wait()

        monkeypatch.setattr(Peer, "_start_training", start_training)
        transport = Transport(network, identity)
        peer = make_peer(tmp_path, transport, identity, run_of)
        life = asyncio.create_task(peer.live(stop))
        await building.wait()
        await asyncio.sleep(0.05)
        assert transport._handlers == {} and network.directory == {} and not life.done()
        built.set()
        await until(lambda: network.directory, "a status")
        assert ROUND_METHOD in transport._handlers
        stop.set()
        await life

    in_time(main())


# ---- several shards -------------------------------------------------------------------------------------------------


def commits_of(peer: Peer, total_tokens: dict[int, int]) -> Callable[[int, int], Coroutine[Any, Any, None]]:
    """Has a shard of ``peer`` commit a round: moves it there, and tells. ``total_tokens``: by round, of each shard."""

    async def commit(shard: int, number: int) -> None:
        exchange, ledger = peer.hosted.exchanges[shard], peer.joined.ledgers[shard]
        head = replace(
            exchange.head, round=number, log_digest=bytes([shard, number]) * 16, total_tokens=total_tokens[number]
        )
        exchange.shard.anchor[:] = 10 * shard + number
        exchange.head = head
        ledger.heads.append(head)
        async with exchange.at_rest():
            await peer._on_commit(
                shard, Committed(record=Record(), head=head, state_digest=exchange.shard.state_digest, counted=False)
            )

    return commit


ORDERS = [
    ("in turn", [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]),
    ("the first shard a round ahead", [(0, 1), (0, 2), (1, 1), (0, 3), (1, 2), (1, 3)]),
    ("the second heard of its last round first", [(0, 1), (1, 1), (0, 2), (1, 2), (1, 3), (0, 3)]),
]


@pytest.mark.parametrize("order", [case[1] for case in ORDERS], ids=[case[0] for case in ORDERS])
def test_checkpoints_of_two_shards_hold_each_at_the_round_and_the_run_ends_at_the_same(
    tmp_path: Path, order: list[tuple[int, int]]
) -> None:
    """At the cadence (round 2), and when the first shard has the tokens of the run (round 3)."""
    spec, data, shards = make_state(2)
    cadence = spec.checkpoints.model_copy(update={"every_rounds": 2})
    spec = spec.model_copy(update={"checkpoints": cadence, "total_tokens": 300})

    async def main() -> None:
        transport = Transport(MemoryNetwork(), identity := Identity(b"i" * 32))
        peer = make_peer(tmp_path, transport, identity, (spec, data, [Shard(spec, s.index, s.anchor) for s in shards]))
        offered: list[StateCopy] = []
        peer.states.checkpoints.offer = offered.append  # type: ignore[method-assign]
        commit, ends = commits_of(peer, {1: 100, 2: 200, 3: 300}), []
        for shard, number in order:
            await commit(shard, number)
            ends.append(peer._finished.is_set())
        assert [copy.round for copy in offered] == [2, 3]
        for copy in offered:
            starts = [0, shards[0].num_values]
            assert [int(copy.anchor[start]) for start in starts] == [copy.round, 10 + copy.round]
            assert [state.log_digest for state in copy.states] == [bytes([shard, copy.round]) * 16 for shard in (0, 1)]
        assert ends == [False] * (len(order) - 1) + [True]

    in_time(main())
