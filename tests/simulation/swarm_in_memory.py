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
from peer.rounds.catch_up import Newcomer, obtain_state
from peer.rounds.exchange import Exchange
from peer.rounds.exchange_parts import Committed, ExchangeParts
from peer.rounds.ledger import Ledger, LedgerOptions
from peer.rounds.member import Member, MemberParts, Words
from peer.rounds.mending import Incident
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
    organizer: Identity, publication: Identity, outer: dict[str, Any] | None = None, **rounds: Any
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
        total_tokens=10**9,
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
    identity: Identity
    folder: Path
    transport: MemoryTransport
    trainer: DriftingTrainer | None
    exchange: Exchange
    member: Member
    digests: dict[int, bytes] = field(default_factory=dict)
    commits: list[Committed] = field(default_factory=list)
    incidents: list[tuple[Incident, np.ndarray]] = field(default_factory=list)
    """with what the peer owed right after"""
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def key(self) -> bytes:
        return self.identity.public_key

    @property
    def round(self) -> int:
        return self.exchange.head.round


class SimulatedSwarm:
    def __init__(self, folder: Path, *, num_values: int = 50_000, **rounds: Any) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.publication = Identity(b"p" * 32)
        self.spec = make_spec(Identity(b"o" * 32), self.publication, **rounds)
        self.num_values = num_values
        self.anchor = np.random.default_rng(0).standard_normal(num_values).astype(np.float32)
        self.seed_identity = Identity(b"s" * 32)
        state = Shard(self.spec, 0, self.anchor.copy())
        self.genesis = Genesis(
            run_id=self.spec.run_id,
            voters=[self.seed_identity.public_key],
            shards=[ShardGenesis(state_digest=state.state_digest, num_values=num_values)],
        )
        self.peers: dict[str, SimulatedPeer] = {}
        self.history: dict[int, set[bytes]] = {}
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
            return all(self.peers[name].round >= round_number for name in names)

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
        for round_number, digests in self.history.items():
            assert len(digests) == 1, f"round {round_number}: {len(digests)} different states"

    async def _start(self, name: str, identity: Identity, *, trains: bool, upload_bps: int = 10**7) -> SimulatedPeer:
        folder = self.folder / name
        transport = self.network.join(identity)
        chunks = ChunkStore(folder / "chunks", 1 << 30, read_in_thread=False)
        ledger = Ledger(folder / "shard-0", genesis_head(self.genesis, 0), chunks, LedgerOptions(archive=not trains))
        head, shard = await self._state(name, transport, ledger, chunks)
        trainer = DriftingTrainer(int.from_bytes(identity.public_key[:4], "big")) if trains else None
        peer: SimulatedPeer

        async def on_commit(committed: Committed) -> None:
            peer.commits.append(committed)
            peer.digests[committed.head.round] = committed.state_digest
            self.anchors[committed.head.log_digest] = peer.exchange.shard.anchor.copy()
            self.history.setdefault(committed.head.round, set()).add(committed.state_digest)

        def on_incident(incident: Incident) -> None:
            owed = peer.exchange.shard.owed(slice(0, self.num_values))
            peer.incidents.append((incident, owed))

        exchange = Exchange(
            ExchangeParts(
                identity=identity,
                transport=transport,
                shard=shard,
                ledger=ledger,
                chunks=chunks,
                founders=tuple(self.genesis.voters),
                trainer=trainer,
                run_blocking=run_inline,
                on_commit=on_commit,
                on_incident=on_incident,
                lease_clock=lambda: asyncio.get_running_loop().time() + self.slept_s.get(name, 0.0),
            ),
            head,
        )
        member = Member(
            MemberParts(
                identity=identity,
                transport=transport,
                exchange=exchange,
                ledger=ledger,
                chunks=chunks,
                rules=self.rules,
                words=Words(trains=trains, upload_bps=upload_bps, admission=self._admission(identity)),
                clock=lambda: asyncio.get_running_loop().time(),
            )
        )
        peer = SimulatedPeer(identity, folder, transport, trainer, exchange, member)
        self.peers[name] = peer
        await member.serve()
        peer.tasks.append(asyncio.ensure_future(member.run()))
        if trainer is not None:
            trainer.moved = np.zeros_like(shard.anchor)
            peer.tasks.append(asyncio.ensure_future(trainer.run()))
        return peer

    async def _state(
        self, name: str, transport: MemoryTransport, ledger: Ledger, chunks: ChunkStore
    ) -> tuple[LogHead, Shard]:
        newcomer = Newcomer(
            transport=transport,
            ledger=ledger,
            chunks=chunks,
            spec=self.spec,
            shard=0,
            genesis_digest=self.genesis.shards[0].state_digest,
            num_values=self.num_values,
            book=HolderBook(random.Random(0)),
        )
        holders = [
            peer.key for peer in self.peers.values() if peer.transport.alive and peer.key != transport.public_key
        ]
        with contextlib.suppress(NotFound):
            head, shard = await obtain_state(newcomer, holders)
            return resume(ledger, head, shard, transport.public_key, lambda head, shard: None), shard
        shard = Shard(self.spec, 0, self.anchor.copy())
        ledger.save_state(0, shard)
        return ledger.head, shard

    def _admission(self, identity: Identity) -> Any:
        admission = Admission(peer_key=identity.public_key, expires_unix_s=2**40)
        return self.publication.sign(ADMISSION_CONTEXT, self.spec.run_id, admission.SerializeToString())
