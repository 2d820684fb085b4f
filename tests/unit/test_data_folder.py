"""The folder of prepared data: whole or not at all, never over somebody's files, and checkable."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from coordinator.data_folder import check_replaceable, resolved, staged, staging_folder, write_durably
from swarm.errors import AlreadyRunning, ConfigError, DiskFull


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "new" / "data"
    with staged(out) as folder:
        write_durably(folder / "manifest.json", b"x")
        assert not out.exists()
    assert (out / "manifest.json").read_bytes() == b"x"
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with staged(out) as folder:
        write_durably(folder / "manifest.json", b"old")

    def interrupted() -> None:
        with staged(out) as folder:
            write_durably(folder / "manifest.json", b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "manifest.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path / "data")
    staging.mkdir()
    (staging / "train-00000.bin").write_bytes(b"half")
    with staged(tmp_path / "data") as folder:
        write_durably(folder / "manifest.json", b"x")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["manifest.json"]


def test_a_file_of_somebody_in_the_staging_folder_is_kept(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path / "data")
    staging.mkdir()
    (staging / "letter.txt").write_bytes(b"dear")
    with pytest.raises(ConfigError, match=r"letter\.txt is in the way"), staged(tmp_path / "data"):
        pass
    assert (staging / "letter.txt").read_bytes() == b"dear"


def test_two_at_once_are_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with staged(out) as folder:
        with pytest.raises(AlreadyRunning), staged(out):
            pass
        write_durably(folder / "manifest.json", b"x")
    assert (out / "manifest.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_a_full_disk_has_its_name_and_leaves_nothing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="no space left") as caught, staged(tmp_path / "data") as folder:
        write_durably(folder / "train-00000.bin", b"x")
    assert "free some space" in caught.value.advice
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write"), staged(tmp_path / "file" / "data"):
        pass


IN_THE_WAY = {
    "somebody's files": (["letter.txt"], True, "holds other files"),
    "prepared data with somebody's files": (["manifest.json", "letter.txt"], True, "holds other files"),
    "token shards without a manifest": (["train-00000.bin"], True, "holds other files"),
    "prepared data": (["manifest.json", "tokenizer.json", "train-00000.bin"], False, "already holds prepared data"),
}


@pytest.mark.parametrize("case", IN_THE_WAY.values(), ids=IN_THE_WAY.keys())
def test_what_lies_in_a_folder_is_not_replaced(case: tuple[list[str], bool, str], tmp_path: Path) -> None:
    names, force, said = case
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=said):
        check_replaceable(tmp_path, force)


def test_prepared_data_may_be_replaced_by_force_and_an_empty_folder_always(tmp_path: Path) -> None:
    check_replaceable(tmp_path, False)
    check_replaceable(tmp_path / "absent", False)
    (tmp_path / "manifest.json").write_bytes(b"x")
    check_replaceable(tmp_path, True)


def test_a_file_or_the_current_folder_is_no_place_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is a file"):
        check_replaceable(tmp_path / "file", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is the current folder"):
        resolved(Path("."))
    with pytest.raises(ConfigError, match="not a folder to replace"):
        resolved(Path("/"))
