"""A whole swarm in one process: the real members, exchanges, ledgers and codecs over a simulated network and clock.

Only three things are simulated: the network, the clock, and the inner steps (a replica drifts by seeded noise).
`fail_at` kills a peer the moment it is about to send, or to make durable, its message of a phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import HolderBook
from peer.rounds.answering import answer_peers
from peer.rounds.catch_up import Newcomer, obtain_state
from peer.rounds.exchange import Exchange
from peer.rounds.exchange_parts import Committed, ExchangeParts
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.member import Member, MemberParts, Words
from peer.rounds.mending import Incident
from peer.rounds.pace import Pace
from peer.rounds.resume import resume
from peer.rounds.shard import Shard
from peer.rounds.statuses import ADMISSION_CONTEXT, StatusRules
from swarm.errors import NotFound
from swarm.identity import Identity
from swarm.log import LogHead, genesis_head
from swarm.proto.common_pb2 import Admission, Genesis, ShardGenesis
from swarm.proto.round_pb2 import RoundMessage
from swarm.run_spec import RunSpec
from tests.simulation.memory_transport import MemoryNetwork, MemoryTransport

PHASES = ("prepare", "promise", "open", "contribution", "average", "accept", "vote", "commit")


def make_spec(
    organizer: Identity,
    publication: Identity,
    outer: dict[str, Any] | None = None,
    num_shards: int = 1,
    total_tokens: int = 10**9,
    **rounds: Any,
) -> RunSpec:
    settings = {
        "tokens_per_round": 3000,
        "reduce_timeout_s": 8.0,
        "takeover_timeout_s": 6.0,
        "status_interval_s": 1.0,
        **rounds,
    }
    return RunSpec(
        name="simulated",
        seed=1,
        num_shards=num_shards,
        total_tokens=total_tokens,
        organizer_key=organizer.public_key.hex(),
        publication_key=publication.public_key.hex(),
        model={"family": "llama", "config": {}},
        data={"manifest_digest": "0" * 64, "tokenizer_digest": "0" * 64},
        outer=outer or {},
        rounds=settings,
    )


class DriftingTrainer:
    """A replica that drifts by seeded noise (uniform: quickly drawn) and counts 100 tokens a tenth of a second."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.moved = np.zeros(0, np.float32)
        self.tokens_trained = 0
        self.tokens_per_step = 100

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self.moved = self.moved + self._rng.random(len(self.moved), np.float32) * 4e-3 - 2e-3
            self.tokens_trained += self.tokens_per_step

    async def snapshot(self) -> tuple[np.ndarray, int]:
        await asyncio.sleep(0.05)
        return self.moved.copy(), self.tokens_trained

    async def land(self, anchor: np.ndarray, snapshot: np.ndarray | None, round_number: int) -> None:
        await asyncio.sleep(0.05)
        self.moved = np.zeros_like(anchor) if snapshot is None else self.moved - snapshot

    @property
    def tokens(self) -> int:
        return self.tokens_trained


async def run_inline(work: Callable[[], Any]) -> Any:
    await asyncio.sleep(0.001)
    return work()


@dataclass
class SimulatedPeer:
    """What is not said to be of all shards is of the first."""

    identity: Identity
    folder: Path
    transport: MemoryTransport
    members: list[Member] = field(default_factory=list)
    """of all shards"""
    trainers: list[DriftingTrainer] = field(default_factory=list)
    """of all shards; they count alike"""
    digests: dict[int, bytes] = field(default_factory=dict)
    commits: list[Committed] = field(default_factory=list)
    incidents: list[tuple[Incident, np.ndarray]] = field(default_factory=list)
    """with what the peer owed right after"""
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def key(self) -> bytes:
        return self.identity.public_key

    @property
    def member(self) -> Member:
        return self.members[0]

    @property
    def exchange(self) -> Exchange:
        return self.member.parts.exchange

    @property
    def trainer(self) -> DriftingTrainer | None:
        return self.trainers[0] if self.trainers else None

    @property
    def rounds(self) -> list[int]:
        """Applied, of every shard."""
        return [member.parts.exchange.head.round for member in self.members]

    @property
    def round(self) -> int:
        return self.exchange.head.round


class SimulatedSwarm:
    def __init__(self, folder: Path, *, num_values: int = 50_000, num_shards: int = 1, **rounds: Any) -> None:
        """``num_values``: of each shard."""
        self.folder = folder
        self.network = MemoryNetwork()
        self.publication = Identity(b"p" * 32)
        self.spec = make_spec(Identity(b"o" * 32), self.publication, num_shards=num_shards, **rounds)
        self.num_values = num_values
        self.first_anchors = [
            np.random.default_rng(shard).standard_normal(num_values).astype(np.float32) for shard in range(num_shards)
        ]
        self.seed_identity = Identity(b"s" * 32)
        states = [Shard(self.spec, shard, anchor.copy()) for shard, anchor in enumerate(self.first_anchors)]
        self.genesis = Genesis(
            run_id=self.spec.run_id,
            voters=[self.seed_identity.public_key],
            shards=[ShardGenesis(state_digest=state.state_digest, num_values=num_values) for state in states],
        )
        self.peers: dict[str, SimulatedPeer] = {}
        self.history: dict[tuple[int, int], set[bytes]] = {}
        """state digests, by shard and round"""
        self.committed_at_s: dict[tuple[int, int], float] = {}
        """when a round was first applied, by shard and round"""
        self.anchors: dict[bytes, np.ndarray] = {}
        """by log digest"""
        self.slept_s: dict[str, float] = {}
        """how far the clocks of peers that slept are ahead of the loop's"""

    @property
    def rules(self) -> StatusRules:
        return StatusRules(
            run_id=self.spec.run_id,
            publication_key=self.publication.public_key,
            founders=tuple(self.genesis.voters),
            lifetime_s=6.0,
        )

    async def start_seed(self) -> SimulatedPeer:
        return await self._start("seed", self.seed_identity, trains=False)

    async def start_volunteer(self, name: str, upload_bps: int = 10**7) -> SimulatedPeer:
        return await self._start(name, Identity(name.encode().ljust(32, b".")), trains=True, upload_bps=upload_bps)

    async def restart(self, name: str) -> SimulatedPeer:
        return await self._start(name, self.peers[name].identity, trains=name != "seed")

    def kill(self, name: str) -> None:
        """As SIGKILL does: nothing more is sent, nothing more is written."""
        peer = self.peers[name]
        peer.transport.alive = False
        for task in peer.tasks:
            task.cancel()

    def trained(self, name: str) -> int:
        """Tokens, since its start."""
        trainer = self.peers[name].trainer
        return trainer.tokens if trainer is not None else 0

    def name_of(self, key: bytes) -> str:
        return next(name for name, peer in self.peers.items() if peer.key == key)

    def fail_at(self, name: str | None, round_number: int, phase: str, *, nth: int = 1) -> list[str]:
        """Kill a peer as it is about to deliver its ``nth`` message of ``phase`` in that round.

        ``name`` None: whoever comes to it first. The answer is filled with the victim's name when it happened.
        """
        victims: list[str] = []
        counts: Counter[str] = Counter()

        def check(sender: bytes, to: bytes, method: str, request: bytes) -> None:
            if victims or method != "round" or (name is not None and sender != self.peers[name].key):
                return
            message = RoundMessage.FromString(request)
            if message.round == round_number and message.WhichOneof("body") == phase:
                victim = self.name_of(sender)
                counts[victim] += 1
                if counts[victim] == nth:
                    victims.append(victim)
                    self.kill(victim)

        self.network.before_delivery.append(check)
        return victims

    async def until_round(self, round_number: int, names: list[str], *, at_most_s: float = 600.0) -> None:
        """Wait until every named peer has applied the round."""

        def reached() -> bool:
            for name in names:
                for task in self.peers[name].tasks:
                    if task.done() and not task.cancelled():
                        task.result()
            return all(min(self.peers[name].rounds) >= round_number for name in names)

        await self.until(reached, f"round {round_number} by {names}", at_most_s=at_most_s)

    async def until(self, condition: Callable[[], bool], what: str, *, at_most_s: float) -> None:
        """Look twice a (virtual) second until ``condition`` holds."""
        for _ in range(int(at_most_s * 2)):
            if condition():
                return
            await asyncio.sleep(0.5)
        rounds = {name: peer.round for name, peer in self.peers.items()}
        raise AssertionError(f"not within {at_most_s} s: {what}; rounds {rounds}")

    def assert_equal_states(self) -> None:
        """The property of the whole system: replicas that applied a round hold equal state digests."""
        assert self.history, "no round was applied"
        for (shard, number), digests in self.history.items():
            assert len(digests) == 1, f"shard {shard}, round {number}: {len(digests)} different states"

    async def _start(self, name: str, identity: Identity, *, trains: bool, upload_bps: int = 10**7) -> SimulatedPeer:
        folder = self.folder / name
        peer = SimulatedPeer(identity, folder, self.network.join(identity))
        chunks = ChunkStore(folder / "chunks", 1 << 30, read_in_thread=False)
        words = Words(trains=trains, upload_bps=upload_bps, admission=self._admission(identity))
        pace = Pace(self.spec.num_shards)
        exchanges = [
            await self._exchange(name, peer, chunks, shard, trains=trains) for shard in range(self.spec.num_shards)
        ]
        peer.members += [
            Member(
                MemberParts(
                    identity=identity,
                    transport=peer.transport,
                    exchange=exchange,
                    ledger=exchange.parts.ledger,
                    chunks=chunks,
                    rules=self.rules,
                    words=words,
                    clock=lambda: asyncio.get_running_loop().time(),
                    pace=pace,
                )
            )
            for exchange in exchanges
        ]
        self.peers[name] = peer
        await answer_peers(peer.members)
        peer.tasks += [asyncio.ensure_future(member.run()) for member in peer.members]
        for trainer, exchange in zip(peer.trainers, exchanges, strict=False):
            trainer.moved = np.zeros_like(exchange.shard.anchor)
            peer.tasks.append(asyncio.ensure_future(trainer.run()))
        return peer

    async def _exchange(
        self, name: str, peer: SimulatedPeer, chunks: ChunkStore, shard: int, *, trains: bool
    ) -> Exchange:
        """The replica of one shard, with a log and a trainer of its own."""
        options = LedgerOptions(archive=not trains)
        ledger = Ledger(peer.folder / f"shard-{shard}", genesis_head(self.genesis, shard), chunks, options)
        head, state = await self._state(peer.transport, ledger, chunks, shard)
        if trains:
            peer.trainers.append(DriftingTrainer(int.from_bytes(peer.key[:4], "big") + shard))

        async def on_commit(committed: Committed) -> None:
            key = (shard, committed.head.round)
            self.history.setdefault(key, set()).add(committed.state_digest)
            self.committed_at_s.setdefault(key, asyncio.get_running_loop().time())
            if shard == 0:
                peer.commits.append(committed)
                peer.digests[committed.head.round] = committed.state_digest
                self.anchors[committed.head.log_digest] = peer.exchange.shard.anchor.copy()

        def on_incident(incident: Incident) -> None:
            owed = peer.exchange.shard.owed(slice(0, self.num_values))
            peer.incidents.append((incident, owed))

        parts = ExchangeParts(
            identity=peer.identity,
            transport=peer.transport,
            shard=state,
            ledger=ledger,
            chunks=chunks,
            founders=tuple(self.genesis.voters),
            trainer=peer.trainers[shard] if trains else None,
            run_blocking=run_inline,
            on_commit=on_commit,
            on_incident=on_incident,
            lease_clock=lambda: asyncio.get_running_loop().time() + self.slept_s.get(name, 0.0),
        )
        return Exchange(parts, head)

    async def _state(
        self, transport: MemoryTransport, ledger: Ledger, chunks: ChunkStore, shard: int
    ) -> tuple[LogHead, Shard]:
        newcomer = Newcomer(
            transport=transport,
            ledger=ledger,
            chunks=chunks,
            spec=self.spec,
            shard=shard,
            genesis_digest=self.genesis.shards[shard].state_digest,
            num_values=self.num_values,
            book=HolderBook(random.Random(0)),
        )
        holders = [
            peer.key for peer in self.peers.values() if peer.transport.alive and peer.key != transport.public_key
        ]
        with contextlib.suppress(NotFound):
            head, state = await obtain_state(newcomer, holders)
            return resume(ledger, head, state, transport.public_key, lambda head, shard: None), state
        state = Shard(self.spec, shard, self.first_anchors[shard].copy())
        ledger.save_state(0, state)
        return ledger.head, state

    def _admission(self, identity: Identity) -> Any:
        admission = Admission(peer_key=identity.public_key, expires_unix_s=2**40)
        return self.publication.sign(ADMISSION_CONTEXT, self.spec.run_id, admission.SerializeToString())
