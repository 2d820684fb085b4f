"""Key files: made once, mode 0600, and refused when others can read them or they are damaged."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarm import keyfiles
from swarm.errors import ConfigError


def test_a_new_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    """The file has mode 0600, and its folder was made for it."""
    path = tmp_path / "keys" / "peer.key"
    keyfiles.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["peer.key"]


def test_a_key_stays_the_same(tmp_path: Path) -> None:
    """The second start is the same peer as the first."""
    path = tmp_path / "peer.key"
    assert keyfiles.load_or_create(path) == keyfiles.load_or_create(path) == keyfiles.load(path)


def test_the_file_is_what_libp2p_reads(tmp_path: Path) -> None:
    """The bytes on disk are the identity's libp2p form."""
    path = tmp_path / "peer.key"
    assert keyfiles.load_or_create(path).libp2p_key() == path.read_bytes()


def test_processes_that_start_at_once_get_one_key(tmp_path: Path) -> None:
    """Of many creators one wins, the others read its whole file, and none leaves litter."""
    path = tmp_path / "peer.key"
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(keyfiles.load_or_create, [path] * 32))
    assert len(found) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o677])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """The advice is the command that closes the file."""
    path = tmp_path / "peer.key"
    keyfiles.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="others") as caught:
        keyfiles.load(path)
    assert caught.value.advice == f"run: chmod 600 {path}"


def _damaged(raw: bytes, kind: str) -> bytes:
    return {
        "empty": b"",
        "cut short": raw[:-1],
        "too long": raw + b"\0",
        "another type": b"\x08\x00" + raw[2:],
        "seed flipped": raw[:4] + bytes([raw[4] ^ 1]) + raw[5:],
        "public key flipped": raw[:-1] + bytes([raw[-1] ^ 1]),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "cut short", "too long", "another type", "seed flipped", "public key flipped"]
)
def test_a_damaged_key_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    """A damaged file is neither used nor replaced: it may still be somebody's only key."""
    path = tmp_path / "peer.key"
    keyfiles.load_or_create(path)
    damaged = _damaged(path.read_bytes(), kind)
    path.write_bytes(damaged)
    with pytest.raises(ConfigError):
        keyfiles.load_or_create(path)
    assert path.read_bytes() == damaged


def test_a_missing_key_is_told_apart(tmp_path: Path) -> None:
    """`load` alone never makes a key."""
    with pytest.raises(FileNotFoundError):
        keyfiles.load(tmp_path / "peer.key")


@pytest.mark.parametrize(
    ("name", "variable", "expected"),
    [("set", "/data", "/data/swarmtrain"), ("empty", "", "~/.local/share/swarmtrain")],
)
def test_keys_lie_in_the_xdg_data_directory(
    monkeypatch: pytest.MonkeyPatch, name: str, variable: str, expected: str
) -> None:
    """$XDG_DATA_HOME decides; an empty one counts as unset (XDG base directory specification)."""
    monkeypatch.setenv("XDG_DATA_HOME", variable)
    assert keyfiles.data_home() == Path(expected).expanduser()
