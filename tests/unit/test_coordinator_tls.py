"""The coordinator's TLS key file."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import tls
from swarm.errors import ConfigError


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    first = tls.load_or_create(tmp_path)
    assert tls.load_or_create(tmp_path) == first
    assert len(first.pin) == 32
    assert (tmp_path / tls.KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [tls.KEY_FILE]


def test_two_folders_have_two_keys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert tls.load_or_create(tmp_path / "a").pin != tls.load_or_create(tmp_path / "b").pin


def test_the_secret_is_not_in_the_repr(tmp_path: Path) -> None:
    assert "PRIVATE" not in repr(tls.load_or_create(tmp_path))


def test_a_file_that_another_process_made_first_stays(tmp_path: Path) -> None:
    first = tls.load_or_create(tmp_path)
    tls._create(tmp_path / tls.KEY_FILE)
    assert tls.load_or_create(tmp_path) == first


@pytest.mark.parametrize("case", ["cut short", "empty", "readable by others", "certificate of another key"])
def test_a_key_file_that_cannot_be_used_is_a_named_error(tmp_path: Path, case: str) -> None:
    tls.load_or_create(tmp_path)
    path = tmp_path / tls.KEY_FILE
    raw = path.read_bytes()
    (tmp_path / "other").mkdir()
    other = tls.load_or_create(tmp_path / "other")
    if case == "readable by others":
        path.chmod(0o644)
    else:
        own_key = raw[: raw.index(b"-----BEGIN CERTIFICATE")]
        changed = {"cut short": raw[:100], "empty": b"", "certificate of another key": own_key + other.certificate_pem}
        path.write_bytes(changed[case])
    with pytest.raises(ConfigError):
        tls.load_or_create(tmp_path)
