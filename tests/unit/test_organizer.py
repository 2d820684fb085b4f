"""What an organizer's program remembers between two starts, so that volunteers find it where it was."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from swarm.cli.organizer import StartOptions, _lasting_seed_port, _remembered_port


def test_the_seed_peers_port_is_the_same_at_every_start(tmp_path: Path) -> None:
    """Also while it is taken for a moment: the process that was killed may still hold it."""
    port = _lasting_seed_port(tmp_path, StartOptions())
    assert 0 < port < 65536
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        assert _lasting_seed_port(tmp_path, StartOptions()) == port
    assert _lasting_seed_port(tmp_path, StartOptions()) == port


def test_a_port_that_the_organizer_names_is_the_one_from_then_on(tmp_path: Path) -> None:
    _lasting_seed_port(tmp_path, StartOptions())
    assert _lasting_seed_port(tmp_path, StartOptions(seed_port=7123)) == 7123
    assert _lasting_seed_port(tmp_path, StartOptions()) == 7123


@pytest.mark.parametrize("text", ["", "seven", "-1", "70000", "\u0663", "7 8"])
def test_a_damaged_memory_of_a_port_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "seed-port"
    path.write_text(text)
    assert _remembered_port(path) == 0
    assert 0 < _lasting_seed_port(tmp_path, StartOptions()) < 65536
