"""The rivals of a round: hivemind's averager behind a trigger, and torch's fp32 all-reduce over gloo.

hivemind's search for a group is not counted: time begins when every peer has its group and is told to go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import hivemind
import psutil
import torch
import torch.distributed
from averaging_place import Place, error_of, serve, settle_in, shares_in, vector
from hivemind.averaging.control import AveragingStage
from hivemind.compression import BlockwiseQuantization

SMALLEST_PART_BYTES = 1 << 14
LARGEST_PART_BYTES = 1 << 19
# As exact as ours on any values; its other codec, uniform, is faster and spoilt by one outlier.
HIVEMIND_CODEC = "blockwise"


def gloo(pipe: Connection, place: Place) -> None:
    settle_in(place)
    os.environ["GLOO_SOCKET_IFNAME"] = place.device
    held: dict[str, torch.Tensor] = {}

    def begin(meet: str) -> dict[str, Any]:
        address, port = meet.split(":")
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
        patience = timedelta(seconds=place.timeout_s)
        torch.distributed.init_process_group("gloo", rank=place.index, world_size=place.peers, timeout=patience)
        return {}

    def prepare(num_values: int) -> dict[str, Any]:
        held["mine"] = torch.from_numpy(vector(place.index, num_values))
        return {}

    def go() -> dict[str, Any]:
        tensor = held["mine"].clone()
        began = time.monotonic()
        torch.distributed.all_reduce(tensor)
        ended = time.monotonic()
        return {"began": began, "ended": ended, "error_of_average": error_of(tensor.numpy() / place.peers, place.peers)}

    serve(pipe, place, {"begin": begin, "prepare": prepare, "arm": lambda: {}, "go": go})
    os._exit(0)  # gloo's threads would wait for the other peers


def hivemind_averager(pipe: Connection, place: Place) -> None:
    settle_in(place)
    side = _HivemindSide(place)
    try:
        serve(pipe, place, {"begin": side.begin, "prepare": side.prepare, "arm": side.arm, "go": side.go})
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(0)


class _HivemindSide:
    """One averager per size: ``bandwidth`` equal for all, parts as small as spreads them over all reducers."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._dht: Any = None
        self._averager: Any = None
        self._step: Any = None

    def begin(self, meet: str) -> dict[str, Any]:
        place = self._place
        self._dht = hivemind.DHT(
            host_maddrs=[f"/ip4/{place.address}/tcp/0"],
            initial_peers=[meet] if meet else [],
            identity_path=None,
            start=True,
        )
        return {"meet": str(self._dht.get_visible_maddrs()[0])}

    def prepare(self, num_values: int) -> dict[str, Any]:
        place = self._place
        if self._averager is not None:
            self._averager.shutdown()
        self._averager = hivemind.DecentralizedAverager(
            [torch.from_numpy(vector(place.index, num_values))],
            self._dht,
            start=True,
            prefix=f"size{num_values}",
            target_group_size=place.peers,
            min_group_size=place.peers,
            min_matchmaking_time=2.0,
            request_timeout=1.5,
            bandwidth=1.0,
            compression=BlockwiseQuantization(),
            part_size_bytes=min(LARGEST_PART_BYTES, max(SMALLEST_PART_BYTES, num_values // (8 * place.peers))),
        )
        return {}

    def arm(self) -> dict[str, Any]:
        """Find the group; what is counted begins with `go`."""
        place = self._place
        num_values = self._averager.total_size
        with self._averager.get_tensors() as tensors:
            tensors[0].copy_(torch.from_numpy(vector(place.index, num_values)))
        self._step = self._averager.step(require_trigger=True, wait=False, timeout=place.timeout_s)
        deadline = time.monotonic() + place.timeout_s
        while self._step.stage is not AveragingStage.AWAITING_TRIGGER:
            if time.monotonic() > deadline or self._step.done():
                raise TimeoutError("no group was found")
            time.sleep(0.01)
        return {}

    def go(self) -> dict[str, Any]:
        began = time.monotonic()
        self._step.allow_allreduce()
        self._step.result(timeout=self._place.timeout_s)
        ended = time.monotonic()
        with self._averager.get_tensors() as tensors:
            values = tensors[0].numpy()
            return {
                "began": began,
                "ended": ended,
                "error_of_average": error_of(values, self._place.peers),
                "shares": shares_in(values, self._place.peers),
                "tensor_digest": hashlib.sha256(values.data).hexdigest(),
            }
