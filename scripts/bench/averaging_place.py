"""What every peer of an averaging benchmark does, whichever side it is on: its place, its vector, its commands.

A peer is a process in a namespace that answers commands with plain dictionaries over a pipe; times are of the
machine's monotonic clock, which all processes share. Leaves what a command does to the sides.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PATTERN_VALUES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a peer runs: its number among ``peers``, its namespace ("": ours), address, the interface that counts."""

    index: int
    peers: int
    namespace: str
    address: str
    device: str
    folder: Path
    timeout_s: float
    upload_bps: int = 10**9
    port: int = 0
    """to listen on; 0: any"""
    begins_anew: bool = True
    """nothing is left on disk of a life before"""


def vector(peer: int, num_values: int) -> np.ndarray:
    """What ``peer`` brings: normal values, the same after every 2**20."""
    pattern = np.random.default_rng(peer).standard_normal(PATTERN_VALUES).astype(np.float32) * np.float32(1e-3)
    return np.resize(pattern, num_values)


def error_of(average: np.ndarray, peers: int) -> float:
    """The distance of ``average`` from the true one, over its norm; 1 or more where nothing was averaged."""
    seen = average[:PATTERN_VALUES]
    true = _true_average(peers)[: len(seen)]
    return float(np.linalg.norm(seen - true) / np.linalg.norm(true))


@functools.cache
def _true_average(peers: int) -> np.ndarray:
    """Made once: peers that are done must not take the cores from those that are not."""
    return np.mean([vector(peer, PATTERN_VALUES) for peer in range(peers)], axis=0)


def shares_in(average: np.ndarray, peers: int) -> list[float]:
    """How much of each peer's vector is in ``average``: 1 / peers where all count alike. Vectors are independent."""
    seen = average[:PATTERN_VALUES]
    vectors = [vector(peer, len(seen)) for peer in range(peers)]
    return [float(seen @ mine / (mine @ mine)) for mine in vectors]


def settle_in(place: Place) -> None:
    """Enter the namespace, end with the benchmark, use one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if place.namespace:
        descriptor = os.open(f"/run/netns/{place.namespace}", os.O_RDONLY)
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "the namespace cannot be entered")
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    if place.begins_anew:
        shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir(parents=True, exist_ok=True)


def usage(place: Place) -> dict[str, Any]:
    """CPU seconds of this process and everything below it, bytes sent at the interface."""
    cpu_s = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == place.device:
            return {"cpu_s": cpu_s, "sent_bytes": int(counts.split()[8])}
    raise RuntimeError(f"no interface {place.device}")


def serve(pipe: Connection, place: Place, commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer commands until `stop`; an error is an answer too."""
    while (message := pipe.recv())[0] != "stop":
        name, *arguments = message
        try:
            pipe.send(usage(place) if name == "usage" else commands[name](*arguments))
        except Exception as error:
            pipe.send({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-3)})
