"""Which documents this peer reads no more: the organizer's removal list, asked for now and then.

Decides when it is asked for, that the newest is kept over restarts, and that an older list, or one that takes something
back, is not followed. Leaves what the list means to `swarm.removals`, and reading to `peer.training.feeding`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from swarm import removals
from swarm.errors import NetworkError, SwarmError
from swarm.files import write_durably
from swarm.proto.common_pb2 import Signed
from swarm.removals import Removal, RemovalList

INTERVAL_S = 60.0  # a list names a round some minutes ahead

logger = logging.getLogger(__name__)


class Coordinator(Protocol):
    async def signed_removals(self) -> Signed | None: ...


class Reader(Protocol):
    def remove(self, removals: Sequence[Removal]) -> None: ...


class RemovalWatch:
    def __init__(
        self, coordinator: Coordinator, reader: Reader | None, run_id: bytes, organizer_key: bytes, folder: Path
    ) -> None:
        """``reader`` is None on a peer that does not train; ``folder`` is the run's."""
        self._coordinator, self._reader, self._run_id, self._key = coordinator, reader, run_id, organizer_key
        self._path = folder / removals.FILE_NAME
        self._followed: RemovalList | None = None

    def resume(self) -> None:
        """Follow the list that was kept; one that cannot be read is asked for anew."""
        if self._reader is None or not self._path.exists():
            return
        try:
            kept = removals.parse_signed(Signed.FromString(self._path.read_bytes()), self._run_id, self._key)
        except (OSError, DecodeError, SwarmError) as error:
            logger.warning("the kept removal list %s is left aside: %s", self._path, error)
            return
        self._reader.remove(kept.removals)
        self._followed = kept

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Ask once; whoever cannot be asked, or answers wrongly, is asked again later."""
        if self._reader is None:
            return
        try:
            signed = await self._coordinator.signed_removals()
            if signed is None:
                return
            found = removals.parse_signed(signed, self._run_id, self._key)
            if removals.supersedes(found, self._followed):
                self._reader.remove(found.removals)
                write_durably(self._path, signed.SerializeToString(deterministic=True))
                self._followed = found  # last: what could not be kept is followed, and tried again
        except NetworkError as error:
            logger.info("the removal list was not asked for: %s", error)  # training goes on without a coordinator
        except SwarmError as error:
            logger.warning("the removal list was not followed or not kept: %s", error)
