"""A peer's life: joins again after divergence but not for ever, leaves while joining, serves once it can train."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer import runtime
from peer.coordinator_client import RunInfo
from peer.home import Home, locked_identity
from peer.joining import Joined, PeerOptions, Start
from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import HolderBook
from peer.rounds.exchange import ROUND_METHOD
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.shard import Shard
from peer.runtime import MAX_DIVERGENCES, News, Peer, run_peer
from peer.training import device, model
from swarm.digest import sha256
from swarm.errors import DivergedError, Unreachable
from swarm.identity import Identity
from swarm.invite import Invite
from swarm.log import genesis_head
from swarm.proto.common_pb2 import Genesis, ShardGenesis, Signed
from swarm.proto.coordinator_pb2 import ReportPayload
from swarm.proto.round_pb2 import Commit
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

    async def live(options: PeerOptions, identity: Any, stop: asyncio.Event, watch: Any) -> None:
        lives.append(identity.peer_id)
        assert len(lives) < 100, "for ever"
        if len(lives) <= times:
            raise DivergedError("round 5 starts from another state than ours")

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


# ---- leaving while joining ------------------------------------------------------------------------------------------


def joining(monkeypatch: pytest.MonkeyPatch, join: Callable[[], Coroutine[Any, Any, Any]]) -> list[str]:
    """Joining opens something and then does ``join``; what was closed is told."""
    closed: list[str] = []

    async def opens(options: PeerOptions, identity: Any, watch: Any, stack: AsyncExitStack) -> Any:
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

    async def watch(self) -> None:
        await asyncio.Event().wait()


class Coordinator:
    """Takes every report, and publishes nothing."""

    async def report(self, report: ReportPayload) -> int:
        return 0

    async def record_commits(self, commits: list[Commit]) -> int:
        return 0

    async def signed_removals(self) -> Signed | None:
        return None


def make_state() -> tuple[RunSpec, Data, Shard]:
    """A small run, its data, and its state of round 0."""
    data = Data([1000], [1000])
    named = {
        "tokenizer_digest": sha256(TOKENIZER).hex(),
        "manifest_digest": sha256(data.manifest.canonical_bytes()).hex(),
    }
    spec = small_spec("llama")
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=named)})
    shard = Shard(spec, 0, model.initial_anchor(model.build_config(spec, data.manifest.vocab_size), spec.seed))
    return spec, data, shard


def make_peer(folder: Path, transport: Transport, identity: Identity, run_of: tuple[RunSpec, Data, Shard]) -> Peer:
    """All of a peer but libp2p, the coordinator, and a trainer."""
    spec, data, shard = run_of
    state = ShardGenesis(state_digest=shard.state_digest, num_values=shard.num_values)
    genesis = Genesis(run_id=spec.run_id, voters=[identity.public_key], shards=[state])
    chunks = ChunkStore(folder / "chunks", 1 << 28)
    head = genesis_head(genesis, 0)
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
        admission=Signed(),
        folder=folder,
        chunks=chunks,
        ledger=Ledger(folder / "shard-0", head, chunks, LedgerOptions()),
        book=HolderBook(random.Random(0)),
    )
    return Peer(joined, Start(head=head, shard=shard, due=()), unheard, None)


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
