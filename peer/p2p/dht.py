"""The run's directory in hivemind's DHT: publishing, looking up, and what hivemind may keep or believe.

Decides how often and from whom a value is asked, and that nothing is cached, believed or merged unchecked. Leaves the
rules of a record to `peer.p2p.directory`, and hivemind itself to `peer.p2p.network`, which hands its names in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from peer.p2p.directory import MAX_LIFETIME_S, Directory, Record, has_room
from swarm.errors import DeadlineExceeded, NetworkError, ProtocolError, Unreachable, VerificationError
from swarm.identity import Identity

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# A record is kept by this many nodes; a few more are asked, for those that came or went meanwhile.
_STORE_NODES = 5
_LOOKUP_NODES = 8
_TIMEOUT_S = 10.0
# An unanswered request of the DHT is given up after this long.
_ANSWER_S = 3.0
# A seed peer that starts itself is busy for longer than that.
_MEET_ATTEMPTS = 3


class Dht:
    """A node of the DHT for the records of one run. Made by `join`."""

    def __init__(self, directory: Directory, identity: Identity, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._identity = identity
        self._public_key = identity.public_key
        self._clock = clock
        self._last_expiry: dict[str, float] = {}
        self._hivemind = SimpleNamespace()
        self.node: Any = None

    async def join(self, hivemind: SimpleNamespace, p2p: Any, seeds: tuple[str, ...], serves: bool) -> None:
        """Start the node. ``serves``: keep records for others too. Raises `Unreachable` or `NetworkError`."""
        self._hivemind = hivemind
        guard = RecordGuard(self._directory, self._clock)
        # No initial peers: hivemind would fail for one bad seed among good ones, and leave a task behind.
        self.node = await hivemind.DHTNode.create(
            p2p=p2p,
            client_mode=not serves,
            record_validator=guard,
            wait_timeout=_ANSWER_S,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
        )
        guard.storage = self.node.protocol.storage
        # What others put into the cache would hide what is stored: nothing is cached here.
        self.node.protocol.cache.store = _refuse
        self.node.protocol.cache.store_subkey = _refuse
        if seeds:
            await self._meet([hivemind.PeerID.from_base58(seed.rpartition("/p2p/")[2]) for seed in seeds])

    async def _meet(self, seeds: list[Any]) -> None:
        """Make ourselves known to a seed peer (which dials us back and compares clocks) and to our neighbours."""
        for _ in range(_MEET_ATTEMPTS):
            pings = (self.node.protocol.call_ping(seed, validate=True) for seed in seeds)
            answers = await asyncio.gather(*pings, return_exceptions=True)
            refusals = [answer for answer in answers if isinstance(answer, BaseException)]
            if any(answer is not None and not isinstance(answer, BaseException) for answer in answers):
                await self.node.find_nearest_nodes([self.node.node_id])
                return
            if refusals:
                advice = "check this machine's clock and firewall"
                raise NetworkError(f"a seed peer refuses us: {refusals[0]}", advice) from refusals[0]
        raise Unreachable("no seed peer answers", "check the network, then try again")

    def knows_node(self, peer_id: Any) -> bool:
        return peer_id in self.node.protocol.routing_table

    async def greet(self, peer_id: Any) -> None:
        """Make a node known to ours, and ours to it."""
        await self.node.protocol.call_ping(peer_id, strict=False)

    async def publish(self, key: str, value: bytes, lifetime_s: float) -> None:
        """See `peer.p2p.transport.Transport.publish`; ``lifetime_s`` is at most 600.

        The DHT keeps whatever lives longest, so a value that follows a longer-living one lives as long as that.
        """
        if not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise ProtocolError(f"a directory value lives for at most {MAX_LIFETIME_S:.0f} s, not {lifetime_s:.0f} s")
        expires = max(self._clock() + lifetime_s, self._last_expiry.get(key, 0.0) + 0.001)
        sealed = self._directory.seal(self._identity, key, value, expires)
        self._last_expiry[key] = expires
        if not await _in_time(self._store(key, sealed, expires)):
            raise NetworkError(f"nobody stored our value under {key!r}")

    async def _store(self, key: str, sealed: bytes, expires: float) -> bool:
        """Give the record to the nodes nearest to ``key``; True where one of them kept it.

        hivemind's own store reports what the last node said, so that one bad node could deny every success.
        """
        dht_id = self._id(key)
        packed = self._hivemind.MSGPackSerializer.dumps(sealed)
        nearest = await self._nearest(dht_id, _STORE_NODES, exclude_self=self.node.protocol.client_mode)
        kept = [False]
        if nearest.pop(self.node.node_id, None) is not None:
            kept.append(self.node.protocol.storage.store_subkey(dht_id, self._public_key, packed, expires))
        calls = (
            self.node.protocol.call_store(peer, [dht_id], [packed], [expires], [self._public_key])
            for peer in nearest.values()
        )
        answers = await asyncio.gather(*calls)
        return any(kept) or any(answer and answer[0] for answer in answers)

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        """See `peer.p2p.transport.Transport.lookup`. Raises `DeadlineExceeded` where the DHT does not answer."""
        if not self._directory.knows(key):
            raise ProtocolError(f"{key!r} is not a key of this run's directory")
        return await _in_time(self._find(key))

    async def _find(self, key: str) -> dict[bytes, bytes]:
        """Ask the nodes nearest to ``key``, and merge what keeps the rules: per signer, what lives longest.

        hivemind's own search stops at whoever claims the latest expiry; this one hears all of them.
        """
        dht_id = self._id(key)
        nearest = await self._nearest(dht_id, _LOOKUP_NODES, exclude_self=True)
        answers = await asyncio.gather(*(self.node.protocol.call_find(peer, [dht_id]) for peer in nearest.values()))
        held = [answer[dht_id][0] for answer in answers if answer] + [self.node.protocol.storage.get(dht_id)]
        found: dict[bytes, tuple[float, bytes]] = {}
        for entry in held:
            if entry is not None and isinstance(entry.value, self._hivemind.DictionaryDHTValue):
                self._merge(dht_id.to_bytes(), entry.value, found)
        return {signer: value for signer, (_, value) in found.items()}

    def _id(self, key: str) -> Any:
        return self._hivemind.DHTID.generate(self._directory.full_key(key))

    async def _nearest(self, dht_id: Any, count: int, *, exclude_self: bool) -> dict[Any, Any]:
        """The ``count`` nodes nearest to a key: peer id by node id."""
        found = await self.node.find_nearest_nodes([dht_id], k_nearest=count, exclude_self=exclude_self)
        return dict(found[dht_id])

    def _merge(self, key_hash: bytes, entries: Any, found: dict[bytes, tuple[float, bytes]]) -> None:
        now = self._clock()
        for subkey, (value, expires) in list(entries.items()):
            packed = self._hivemind.MSGPackSerializer.dumps(subkey)
            record = Record(key_hash=key_hash, subkey=packed, value=value, expires_unix_s=expires)
            with contextlib.suppress(VerificationError):
                signer, plain = self._directory.open(record, now)
                if expires > max(now, found.get(signer, (0.0, b""))[0]):
                    found[signer] = (expires, plain)


class RecordGuard:
    """What hivemind asks before it keeps or believes a record (its RecordValidatorBase, by shape)."""

    def __init__(self, directory: Directory, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock
        self.storage: Any = None

    def validate(self, record: Any) -> bool:
        checked = Record(
            key_hash=record.key, subkey=record.subkey, value=record.value, expires_unix_s=record.expiration_time
        )
        try:
            signer, _ = self._directory.open(checked, self._clock())
        except VerificationError as error:
            logger.debug("refused a directory record: %s", error)
            return False
        return self._has_room(record, signer)

    def _has_room(self, record: Any, signer: bytes) -> bool:
        kept = self.storage.get(int.from_bytes(record.key, "big")) if self.storage is not None else None
        if kept is None:
            return True
        others = [entry.value for other, entry in kept.value.data.items() if other != signer]
        return has_room(len(others), sum(map(len, others)), len(record.value))

    def sign_value(self, record: Any) -> bytes:
        return bytes(record.value)

    def strip_value(self, record: Any) -> bytes:
        return bytes(record.value)


async def _in_time(work: Coroutine[Any, Any, _T]) -> _T:
    try:
        return await asyncio.wait_for(work, _TIMEOUT_S)
    except asyncio.TimeoutError as error:
        raise DeadlineExceeded(f"the directory did not answer within {_TIMEOUT_S:.0f} s") from error


def _refuse(*_: object, **__: object) -> bool:
    return False
