"""The laboratory: a star of network namespaces, one per peer, around a hub that forwards.

Decides how links are built: each peer's interface `eth0` sends at its upload rate, the hub's end of it at its download
rate (`tc tbf`); where a link has delay, jitter or loss, a relay (`relay.py`) holds the packets in the hub. Everything
lives in namespaces named after the process that owns them, so nothing of it is seen outside, and what a killed owner
left is found and removed. A peer may sit behind a router of its own that translates addresses (nftables), as at home:
whoever is behind it can dial, and is dialled by nobody. Leaves what runs in the namespaces to others. Needs root.

    with Lab([Link(up_bps=20e6, down_bps=100e6, delay_s=0.01)] * 4) as lab:
        subprocess.run([*lab.inside(0), "ping", "-c1", lab.address(1)])
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NAMESPACES = Path("/run/netns")
PREFIX = "netlab"
DEVICE = "tun0"
NETWORK = "10.77"
# A queue as in a home router: what 50 ms of the rate are, but never less than a few unsegmented packets.
QUEUE_S = 0.05
LEAST_QUEUE_BYTES = 256 << 10
# Packets may be as large as this before they are cut for the wire; a bucket must hold one.
BURST_BYTES = 66_000
KILL_WAIT_S = 5.0
CUT_PREFERENCE = 10
NATS = {"": "", "cone": "masquerade", "symmetric": "masquerade fully-random"}
# What comes unasked to the router or through it is dropped without a word, as home routers do.
NAT_RULES = """
table ip nat {{
  chain out {{
    type nat hook postrouting priority srcnat
    oifname "eth0" {masquerade}
  }}
}}
table ip guard {{
  chain input {{
    type filter hook input priority filter
    iifname "eth0" ct state new drop
  }}
  chain forward {{
    type filter hook forward priority filter
    iifname "eth0" ct state new drop
  }}
}}
"""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A peer's access: rates in bit/s (None: as fast as the machine) and the way to the hub.

    A path has the delay and jitter of both its ends: 25 ms at each are 50 ms one way.
    """

    up_bps: float | None = None
    down_bps: float | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    nat: str = ""
    """"": none. "cone": one outside port for each inside port. "symmetric": another one for every connection."""

    def __post_init__(self) -> None:
        rates_fit = all(rate is None or rate > 0 for rate in (self.up_bps, self.down_bps))
        if not rates_fit or min(self.delay_s, self.jitter_s) < 0 or not 0 <= self.loss < 1 or self.nat not in NATS:
            raise ValueError(f"not a link: {self}")


def why_not() -> str | None:
    """Why this machine cannot hold a laboratory; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is not here"
    tried = subprocess.run(["unshare", "--net", "ip", "link", "add", "x0", "type", "veth"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode(errors='replace').strip()}"


def why_no_nat() -> str | None:
    """Why this machine cannot hold a laboratory with routers that translate addresses; None where it can."""
    if (reason := why_not()) is not None:
        return reason
    if shutil.which("nft") is None:
        return "nftables is not installed"
    tried = subprocess.run(
        ["unshare", "--net", "nft", NAT_RULES.format(masquerade="masquerade")], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"no address translation here: {tried.stderr.strip()[:200]}"


class Lab:
    """Namespaces 0, 1, ... as ``links`` says, while the context lasts."""

    def __init__(self, links: Sequence[Link], network: str = NETWORK) -> None:
        """``network``: the first two numbers of all addresses; libp2p tells public ones from private ones."""
        self.links, self._network = tuple(links), network
        self._name = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Lab:
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def namespace(self, peer: int) -> str:
        return f"{self._name}-{peer}"

    def address(self, peer: int) -> str:
        """Where others see this peer; of one behind a router, the router's."""
        return f"{self._network}.{peer}.2"

    def inside(self, peer: int) -> list[str]:
        """What a command is started with to run in the namespace of ``peer``."""
        return ["ip", "netns", "exec", self.namespace(peer)]

    def wire_bytes(self, peer: int) -> tuple[int, int]:
        """(sent, received) at the interface of ``peer``, headers of IP and Ethernet included.

        What leaves the kernel unsegmented has its headers counted once.
        """
        folder = "/sys/class/net/eth0/statistics"
        answer = _run([*self.inside(peer), "cat", f"{folder}/tx_bytes", f"{folder}/rx_bytes"])
        sent, received = answer.split()
        return int(sent), int(received)

    def cut(self, one: Sequence[int], other: Sequence[int]) -> None:
        """From now on nothing that a peer of ``one`` sends reaches a peer of ``other``."""
        for sender in one:
            for target in other:
                path = ["from", self.address(sender), "to", self.address(target)]
                _run(["ip", "-n", self._hub, "rule", "add", "pref", str(CUT_PREFERENCE), *path, "blackhole"])

    def heal(self) -> None:
        """No path is cut any more."""
        while f"{CUT_PREFERENCE}:" in _run(["ip", "-n", self._hub, "rule", "show"]):
            _run(["ip", "-n", self._hub, "rule", "delete", "pref", str(CUT_PREFERENCE)])

    @property
    def _hub(self) -> str:
        return f"{self._name}-hub"

    def _build(self) -> None:
        delayed = any(link.delay_s or link.jitter_s or link.loss for link in self.links)
        self._add(self._hub)
        in_hub = ["ip", "netns", "exec", self._hub]
        settings = ["net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0"]
        _run([*in_hub, "sysctl", "-q", "-w", *settings])
        if delayed:
            _run([*in_hub, "ip", "tuntap", "add", "dev", DEVICE, "mode", "tun", "vnet_hdr"])
            _run([*in_hub, "ip", "link", "set", DEVICE, "up", "txqueuelen", "10000"])
            _run([*in_hub, "ip", "route", "add", "default", "dev", DEVICE, "table", "100"])
        for peer, link in enumerate(self.links):
            self._add_peer(peer, link)
            if delayed:
                _run([*in_hub, "ip", "rule", "add", "iif", f"v{peer}", "lookup", "100"])
        if delayed:
            self._start_relay(in_hub)

    def _add(self, namespace: str) -> None:
        _run(["ip", "netns", "add", namespace])
        _run(["ip", "-n", namespace, "link", "set", "lo", "up"])

    def _add_peer(self, peer: int, link: Link) -> None:
        outside, end, gateway = self.namespace(peer), f"v{peer}", f"{self._network}.{peer}.1"
        if link.nat:
            outside = f"{outside}-nat"
        self._add(outside)
        self._join(self._hub, end, gateway, outside, "eth0", self.address(peer))
        _run(["ip", "-n", outside, "route", "add", "default", "via", gateway])
        _limit(outside, "eth0", link.up_bps)
        _limit(self._hub, end, link.down_bps)
        if link.nat:
            self._add_router(peer, outside, NATS[link.nat])

    def _add_router(self, peer: int, router: str, masquerade: str) -> None:
        """Put the peer itself behind ``router``, on a private network."""
        inside, gateway = self.namespace(peer), f"192.168.{peer}.1"
        self._add(inside)
        self._join(router, "home", gateway, inside, "eth0", f"192.168.{peer}.2")
        _run(["ip", "-n", inside, "route", "add", "default", "via", gateway])
        _run(["ip", "netns", "exec", router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
        _run(["ip", "netns", "exec", router, "nft", NAT_RULES.format(masquerade=masquerade)])

    def _join(self, one: str, device: str, address: str, other: str, other_device: str, other_address: str) -> None:
        """A cable between two namespaces, its ends with addresses."""
        ends = ["type", "veth", "peer", "name", other_device, "netns", other]
        _run(["ip", "link", "add", device, "netns", one, *ends])
        for namespace, name, own in ((one, device, address), (other, other_device, other_address)):
            _run(["ip", "-n", namespace, "address", "add", f"{own}/24", "dev", name])
            _run(["ip", "-n", namespace, "link", "set", name, "up"])

    def _start_relay(self, in_hub: list[str]) -> None:
        links = {self.address(i): (k.delay_s, k.jitter_s, k.loss) for i, k in enumerate(self.links)}
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py")), DEVICE, json.dumps(links)]
        self._relay = subprocess.Popen(
            [*in_hub, *command], stdout=subprocess.PIPE, text=True, preexec_fn=_die_with_parent
        )
        if self._relay.stdout is None or self._relay.stdout.readline().strip() != "ready":
            raise RuntimeError("the relay did not start")

    def _remove(self) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()
            self._relay = None
        for path in NAMESPACES.glob(f"{self._name}-*"):
            _delete(path.name)


def remove_leftovers() -> None:
    """Remove the namespaces of owners that are gone, and end what still runs in them."""
    for path in NAMESPACES.glob(f"{PREFIX}-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _delete(path.name)


def _delete(namespace: str) -> None:
    """End what runs in ``namespace`` and remove it; nothing where another did so already."""
    deadline = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < deadline:
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        if not listed.stdout.split():
            break
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _limit(namespace: str, device: str, rate_bps: float | None) -> None:
    if rate_bps is None:
        return
    queue_bytes = max(LEAST_QUEUE_BYTES, int(rate_bps / 8 * QUEUE_S))
    shape = ["rate", f"{int(rate_bps)}bit", "burst", str(BURST_BYTES), "limit", str(queue_bytes)]
    _run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *shape])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
