"""The simulated network keeps the same contract as libp2p: what the simulation proves rests on it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from peer.p2p.transport import Transport
from swarm.identity import Identity
from tests.contract_transport import TransportContract
from tests.simulation import virtual_time
from tests.simulation.memory_transport import MemoryNetwork


class TestMemoryTransportContract(TransportContract):
    async def make(self, count: int) -> list[Transport]:
        network = MemoryNetwork()
        return [network.join(Identity.generate()) for _ in range(count)]

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        virtual_time.run(scenario)
