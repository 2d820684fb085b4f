"""`swarm data` on real text: Python's own library from files to batches, and what goes wrong on real disks."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from peer.p2p.chunk_store import token_shard_source
from peer.training.data import ReaderOptions, TokenReader
from swarm import assignment, data_manifest

PACKAGES = tuple(Path(asyncio.__file__).parents[1] / name for name in ("json", "email", "asyncio"))
_PROGRAM = """
import sys
from swarm.cli import data
from swarm.errors import SwarmError
try:
    data.app(sys.argv[1:], standalone_mode=False)
except SwarmError as error:
    sys.exit(f"{type(error).__name__} {error.exit_code}: {error} ({error.advice})")
"""


def swarm_data(*arguments: object, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `swarm data` in a process of its own, where wanted with a limit on the size of files."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    with _file_size_limit(limit_bytes):
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@contextmanager
def _file_size_limit(limit_bytes: int | None) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if limit_bytes is None else limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def prepared(out: Path, *more: object) -> dict[str, Any]:
    run = swarm_data("prepare", *PACKAGES, "--out", out, "--vocab-size", 1000, "--validation-fraction", 0.05,
                     "--token-shard-tokens", 65536, "--json", *more)  # fmt: skip
    assert run.returncode == 0, run.stderr
    summary: dict[str, Any] = json.loads(run.stdout)
    return summary


@pytest.fixture(scope="module")
def standard_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepared(out)
    return out


def test_the_same_text_gives_the_same_bytes(standard_library: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "again")
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (standard_library, tmp_path / "again")
    )
    assert len(first) >= 5
    assert first == second


def test_show_and_verify_say_what_was_prepared(standard_library: Path) -> None:
    shown = json.loads(swarm_data("show", standard_library, "--json").stdout)
    verified = json.loads(swarm_data("verify", standard_library, "--json").stdout)
    assert shown["manifest_digest"] == verified["manifest_digest"]
    assert shown["documents"] > 60
    assert shown["tokens"]["train"] > 10 * shown["tokens"]["validation"] > 0
    assert [source["path"] for source in shown["sources"]] == [str(package) for package in PACKAGES]
    plain = swarm_data("show", standard_library).stdout
    assert shown["manifest_digest"] in plain
    assert f"train: {shown['tokens']['train']} tokens" in plain


def test_a_peer_reads_from_a_seed_peers_folder(standard_library: Path, tmp_path: Path) -> None:
    manifest = data_manifest.load(standard_library)
    source = token_shard_source(standard_library, manifest)

    async def fetch(digest: bytes, size: int) -> bytes:
        data = source(digest)
        assert data is not None and len(data) == size
        return data

    async def read() -> None:
        options = ReaderOptions(sequence_length=64, cache=tmp_path, max_cache_bytes=1 << 20)
        reader = TokenReader(manifest, options, fetch)
        for round_number in range(1, 4):
            plan = assignment.reading(7, b"k" * 32, round_number, 0, reader.sequences_per_shard(), 8)
            await reader.ensure(plan.token_shard)
            assert reader.batch(plan).shape == (8, 65)
        await reader.ensure_validation(16)
        assert sum(len(batch) for batch in reader.validation_batches(16, 4)) == 16

    asyncio.run(read())


@pytest.mark.parametrize("name", ["tokenizer.json", "train-00001.bin", "validation-00000.bin"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_verify_names_the_damaged_file(name: str, damage: str, standard_library: Path, tmp_path: Path) -> None:
    for path in standard_library.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        raw = bytearray((tmp_path / name).read_bytes())
        raw[100] ^= 1
        (tmp_path / name).write_bytes(raw)
    run = swarm_data("verify", tmp_path)
    assert "DigestError 76" in run.stderr and name in run.stderr


def test_verify_refuses_a_manifest_of_another_digest_and_a_folder_without_one(
    standard_library: Path, tmp_path: Path
) -> None:
    digest = json.loads(swarm_data("show", standard_library, "--json").stdout)["manifest_digest"]
    assert swarm_data("verify", standard_library, "--digest", digest).returncode == 0
    other = swarm_data("verify", standard_library, "--digest", "ab" * 32)
    assert "DigestError 76: the data manifest" in other.stderr
    assert "DataError 65" in swarm_data("verify", tmp_path).stderr


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    run = swarm_data("prepare", *PACKAGES, "--out", tmp_path / "data", limit_bytes=50_000)
    assert "DiskFull 74: no space left" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_prepared_data_is_replaced_only_by_force(tmp_path: Path) -> None:
    first = prepared(tmp_path / "data")
    refused = swarm_data("prepare", *PACKAGES, "--out", tmp_path / "data")
    assert "ConfigError 78" in refused.stderr and "--force" in refused.stderr
    second = prepared(tmp_path / "data", "--force", "--tokenizer", tmp_path / "data" / "tokenizer.json")
    assert second["manifest_digest"] == first["manifest_digest"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_pile_s_shape_with_malformed_lines_is_prepared_or_strictly_refused(tmp_path: Path) -> None:
    modules = [path.read_text() for path in sorted(PACKAGES[1].glob("*.py"))]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}) for text in modules]
    lines[3:3] = ["{broken", '{"meta": {}}']
    source = tmp_path / "00.jsonl.zst"
    source.write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    arguments = ("prepare", source, "--out", tmp_path / "data", "--vocab-size", 300, "--validation-fraction", 0.2)
    strict = swarm_data(*arguments, "--strict")
    assert "DataError 65" in strict.stderr and f"{source}:4: not JSON" in strict.stderr
    run = swarm_data(*arguments, "--json")
    assert json.loads(run.stdout)["malformed"] == 2
    assert f"{source}:4: not JSON" in run.stderr and f'{source}:5: no string "text"' in run.stderr
