"""The network laboratory of the benchmarks: its links are as slow and as far as they say, and nothing of it stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts.netlab import tcp
from scripts.netlab.lab import NAMESPACES, PREFIX, Lab, Link, remove_leftovers, why_no_nat, why_not

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]


def test_a_link_has_its_rate_and_its_delay_and_leaves_nothing() -> None:
    """TCP reaches most of 100 Mbit/s over a path of 50 ms each way, its bytes are counted, and the namespaces go."""
    link = Link(up_bps=100e6, down_bps=100e6, delay_s=0.025)
    with Lab([link] * 2) as lab:
        line = tcp.measure(lab.inside(0), lab.inside(1), lab.address(1), 1.0)
        sent, _ = lab.wire_bytes(0)
        _, received = lab.wire_bytes(1)
        names = {lab.namespace(0), lab.namespace(1)}
        assert names <= {path.name for path in NAMESPACES.iterdir()}
    assert 50e6 < line["bits_per_s"] < 100e6
    assert 0.1 <= line["round_trip_s"] < 0.2
    assert sent >= received > 50e6 / 8
    assert not names & {path.name for path in NAMESPACES.iterdir()}


def test_a_cut_path_carries_nothing_one_way_until_it_is_healed() -> None:
    """Others keep their paths, and so does the other direction."""
    with Lab([Link()] * 3) as lab:
        assert all(arrives(lab, a, b) for a, b in ((0, 1), (1, 0), (0, 2)))
        lab.cut([0], [1])
        assert [arrives(lab, a, b) for a, b in ((0, 1), (1, 0), (0, 2))] == [False, True, True]
        lab.heal()
        assert arrives(lab, 0, 1)


@pytest.mark.skipif(bool(why_no_nat()), reason=str(why_no_nat()))
def test_behind_a_router_a_peer_reaches_others_and_is_reached_by_nobody() -> None:
    """Both kinds of router; an outside port lasts for a cone and changes by the connection for a symmetric one."""
    with Lab([Link(), Link(nat="cone"), Link(nat="symmetric"), Link()]) as lab:
        assert [arrives(lab, 1, 0), arrives(lab, 2, 0)] == [True, True]
        assert [arrives(lab, 0, 1), arrives(lab, 0, 2), arrives(lab, 1, 2)] == [False, False, False]
        ports = {peer: {outside_port(lab, peer, target) for target in (0, 3)} for peer in (1, 2)}
    assert ports[1] == {INSIDE_PORT}
    assert len(ports[2]) == 2


HEAR = (
    "import socket; s = socket.socket(2, 2); s.bind(('', 7)); print('ready', flush=True); s.settimeout({}); s.recv(9)"
)
SAY = "import socket; socket.socket(2, 2).sendto(b'x', ('{}', 7))"


INSIDE_PORT = 4567
HEAR_PORT = (
    "import socket; s = socket.socket(2, 2); s.bind(('', 7)); print('ready', flush=True); s.settimeout(5);"
    "print(s.recvfrom(9)[1][1])"
)
SAY_FROM = "import socket; s = socket.socket(2, 2); s.bind(('', {})); s.sendto(b'x', ('{}', 7))"


def outside_port(lab: Lab, sender: int, target: int) -> int:
    """From which port ``target`` sees what ``sender`` sends from its own fixed one."""
    python = [sys.executable, "-I", "-S", "-c"]
    with subprocess.Popen([*lab.inside(target), *python, HEAR_PORT], stdout=subprocess.PIPE, text=True) as hearer:
        assert hearer.stdout is not None and hearer.stdout.readline()
        saying = SAY_FROM.format(INSIDE_PORT, lab.address(target))
        subprocess.run([*lab.inside(sender), *python, saying], check=True)
        return int(hearer.stdout.readline())


def arrives(lab: Lab, sender: int, target: int) -> bool:
    """Whether a datagram does; one that is cut off is waited for half a second."""
    python = [sys.executable, "-I", "-S", "-c"]
    hearing = [*lab.inside(target), *python, HEAR.format(0.5)]
    with subprocess.Popen(hearing, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as hearer:
        assert hearer.stdout is not None and hearer.stdout.readline()
        subprocess.run([*lab.inside(sender), *python, SAY.format(lab.address(target))], check=True)
        return hearer.wait(10) == 0


def test_what_a_killed_owner_left_is_removed() -> None:
    """Namespaces of an owner that is gone are deleted, with what runs in them; those of the living stay."""
    with subprocess.Popen(["true"]) as gone:
        pass
    name = f"{PREFIX}-{gone.pid}-abcdef-0"
    subprocess.run(["ip", "netns", "add", name], check=True)
    left = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "60"])
    with Lab([Link()]) as lab:
        assert left.wait(10) != 0
        assert name not in {path.name for path in NAMESPACES.iterdir()}
        remove_leftovers()
        assert lab.namespace(0) in {path.name for path in NAMESPACES.iterdir()}
