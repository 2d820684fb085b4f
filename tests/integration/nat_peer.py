"""A peer in a process of its own, for tests that put it into a network namespace: it says who it is, and calls others.

    python -m tests.integration.nat_peer '{"seeds": [...], "listen": [...], "relays": true}'

Then one JSON object a line: ``{"key": hex, "addresses": [...], "bytes": n}`` asks a peer to answer so many bytes with
their digest: the answer is ``{"right": whether it is that, "direct": [...], "connect_s": ..., "call_s": ...}``, where
"direct" are the far ends of the connections without a relay.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from typing import Any

from peer.p2p.network import Network, NetworkConfig, open_network
from swarm.errors import SwarmError
from swarm.identity import Identity, peer_id_of

RUN_ID = b"a run behind routers"


async def digest(caller: bytes, request: bytes) -> bytes:
    return hashlib.sha256(caller + request).digest()


def check(caller: bytes, proof: bytes) -> None:
    """The relay's: everybody is admitted here."""


async def answer(network: Network, asked: dict[str, Any]) -> dict[str, Any]:
    key, payload = bytes.fromhex(asked["key"]), bytes(asked["bytes"])
    began = time.monotonic()
    try:
        await network.connect(key, tuple(asked["addresses"]), timeout_s=20)
        connected = time.monotonic()
        got = await network.call(key, "digest", payload, timeout_s=60)
    except SwarmError as error:
        return {"error": str(error)}
    right = got == hashlib.sha256(network.public_key + payload).digest()
    return {
        "right": right,
        "direct": await network._control.seen_at(key),
        "connect_s": connected - began,
        "call_s": time.monotonic() - connected,
    }


async def main(options: dict[str, Any]) -> None:
    relays = options.get("relays", False)
    config = NetworkConfig(
        run_id=RUN_ID,
        clock=time.time,
        directory_keys=("status-0",),
        host_maddrs=tuple(options["listen"]),
        initial_peers=tuple(options.get("seeds", ())),
        relay_for=check if relays else None,
        proof=None if relays else lambda: b"",
    )
    network = await open_network(config, Identity.generate())
    await network.serve("digest", digest)

    def say(values: dict[str, Any]) -> None:
        print(json.dumps(values), flush=True)

    say({"key": network.public_key.hex(), "id": peer_id_of(network.public_key), "addresses": network.addresses})
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            say(await answer(network, json.loads(line)))
    finally:
        await network.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
