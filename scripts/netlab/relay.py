"""Delays, jitters and loses IP packets between a TUN device and itself; standard library only.

Runs in the laboratory's hub, whose routes send every packet of a peer to the device; what is written back the kernel
forwards to its receiver. A packet waits for the delays of both its ends; packets of one pair stay in order. Packets
come unsegmented as the sender's kernel made them (virtio headers), so that 100 Mbit/s are a few thousand a second.

    python -I -S relay.py DEVICE '{"10.77.0.2": [delay_s, jitter_s, loss], ...}'
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time

IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
VNET_HEADER_BYTES = 10
MAX_PACKET_BYTES = VNET_HEADER_BYTES + (1 << 16)
# Half a second of a gigabit: what a long fat path holds; more is a sender that nobody slows down.
MAX_QUEUED_BYTES = 64 << 20
READS_AT_ONCE = 64


def open_tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tun, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return tun


class Relay:
    """Packets by the time at which they go on."""

    def __init__(self, tun: int, links: dict[bytes, tuple[float, float, float]]) -> None:
        self._tun = tun
        self._links = links
        self._waiting: list[tuple[float, int, bytes]] = []
        self._queued_bytes = 0
        self._last: dict[bytes, float] = {}
        self._count = 0
        self._rng = random.Random(1)

    def run(self) -> None:
        while True:
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                self._release(heapq.heappop(self._waiting)[2])
            timeout_s = self._waiting[0][0] - now if self._waiting else None
            if select.select([self._tun], [], [], timeout_s)[0]:
                self._take()

    def _take(self) -> None:
        for _ in range(READS_AT_ONCE):
            try:
                packet = os.read(self._tun, MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            path = packet[VNET_HEADER_BYTES + 12 : VNET_HEADER_BYTES + 20]
            source, target = self._links.get(path[:4]), self._links.get(path[4:])
            if packet[VNET_HEADER_BYTES] >> 4 != 4 or source is None or target is None:
                continue
            jitter_s, loss = source[1] + target[1], 1 - (1 - source[2]) * (1 - target[2])
            full = self._queued_bytes + len(packet) > MAX_QUEUED_BYTES
            if full or (loss and self._rng.random() < loss):
                continue
            due = time.monotonic() + source[0] + target[0] + (self._rng.random() * jitter_s if jitter_s else 0.0)
            due = self._last[path] = max(due, self._last.get(path, 0.0))
            self._count += 1
            self._queued_bytes += len(packet)
            heapq.heappush(self._waiting, (due, self._count, packet))

    def _release(self, packet: bytes) -> None:
        self._queued_bytes -= len(packet)
        try:
            os.write(self._tun, packet)
        except OSError:  # the receiver's interface is down or its queue is full: a lost packet
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever built the laboratory takes it down
    name, links = sys.argv[1], json.loads(sys.argv[2])
    tun = open_tun(name)
    print("ready", flush=True)
    Relay(tun, {socket.inet_aton(address): tuple(link) for address, link in links.items()}).run()


if __name__ == "__main__":
    main()
