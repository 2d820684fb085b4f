"""A repository of the Hub as a mirror: written by the coordinator, told, read by whoever downloads; and `swarm push`.

Against a stand-in that keeps large files elsewhere and sends on to them, as the Hub does. The library's newer protocol
for large files (Xet) is switched off: it has no stand-in.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.checkpoint_files import PublishedFolder
from coordinator.mirroring import write_mirror
from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import Fetching
from peer.checkpoints.mirrors import open_mirrors
from peer.checkpoints.sources import Tally
from peer.checkpoints.verify import verify_folder
from peer.p2p.fetch import FetchLimits
from swarm.errors import NetworkError, NotFound
from swarm.manifest import BF16, FP32
from swarm.run_file import MirrorTargets
from swarm.storage import Storage
from tests.checkpoint_samples import SignedCheckpoint, make_parts, signed_checkpoint, small_checkpoint
from tests.hub_server import TOKEN, Hub, hub_server

REPOSITORY = "volunteers/sample"
URL = f"hf://{REPOSITORY}"
QUICK = FetchLimits(per_holder=2, total=8, retry_pause_s=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    """Weights of three chunks."""
    return signed_checkpoint(tmp_path / "made", make_parts())


def mirrored(made: SignedCheckpoint, url: str = URL) -> None:
    write_mirror(Storage(url), PublishedFolder(path=made.folder, manifest=made.manifest))


def get(made: SignedCheckpoint, out: Path, dtype: str = FP32, named: tuple[str, ...] = ()) -> tuple[Path, Tally]:
    """From what a coordinator that writes to the repository tells, or from where the person says."""
    told = () if named else MirrorTargets(write=(URL,)).told
    tally = Tally()
    order = Order(
        run_id=made.run_id, signed_spec=made.signed_spec, publication=made.publication, target=out, dtype=dtype
    )

    async def body() -> Path:
        async with open_mirrors(named, told, made.manifest.round) as found:
            return (await download(order, Fetching(sources=found, limits=QUICK, tally=tally))).folder

    return asyncio.run(asyncio.wait_for(body(), 60)), tally


def test_a_repository_is_made_written_told_and_read(
    hub: Hub, made: SignedCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each set comes whole, with no more bytes than it has; large files come from where the Hub sends on to."""
    caplog.set_level(logging.DEBUG)
    mirrored(made)
    assert hub.messages[-1] == "Add checkpoint-10/swarm-manifest.sig", "what makes the rest believed comes last"
    hub.passwords.clear()
    for dtype in (BF16, FP32):
        hub.sent_bytes = 0
        folder, tally = get(made, tmp_path / dtype, dtype)
        size_bytes = made.manifest.file_set(dtype).size_bytes
        assert tally.by_kind() == {"mirrors": size_bytes}
        assert hub.sent_bytes == size_bytes
        assert verify_folder(folder, made.run_id).ok
    assert hub.passwords == [], "who reads a mirror that it was told of does not say who it is"
    assert hub.told_to_store == [] and TOKEN not in caplog.text


def test_what_lies_there_is_not_written_again(hub: Hub, made: SignedCheckpoint) -> None:
    mirrored(made)
    hub.messages.clear()
    mirrored(made)
    assert len(hub.messages) == 4, "the manifest and what signs it"


def test_a_private_repository_is_read_by_who_names_it(hub: Hub, made: SignedCheckpoint, tmp_path: Path) -> None:
    mirrored(made)
    hub.is_private = True
    with pytest.raises(NotFound):
        get(made, tmp_path / "told")
    folder, _ = get(made, tmp_path / "named", named=(URL,))
    assert verify_folder(folder, made.run_id).ok


def test_a_web_address_of_the_hub_is_a_mirror_for_who_names_it(
    hub: Hub, made: SignedCheckpoint, tmp_path: Path
) -> None:
    """It redirects, which a mirror that the coordinator tells of may not."""
    mirrored(made)
    hub.passwords.clear()
    folder, tally = get(made, tmp_path / "out", named=(f"{hub.url}/{REPOSITORY}/resolve/main",))
    assert verify_folder(folder, made.run_id).ok and tally.by_kind() == {"mirrors": made.manifest.size_bytes}
    assert hub.passwords == []


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses_is_a_network_error_without_the_token(
    hub: Hub, tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    made = small_checkpoint(tmp_path / "small")
    hub.refuse = status
    with pytest.raises(NetworkError) as caught:
        mirrored(made)
    assert TOKEN not in str(caught.value) + caught.value.advice + caplog.text


def test_a_dataset_repository_is_not_made_by_itself(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Storage("hf://datasets/volunteers/sample").write_bytes("a.json", b"{}")
    assert hub.repositories == {}


def test_push_says_where_it_went_and_never_the_token(hub: Hub, tmp_path: Path) -> None:
    """The command itself, in a process of its own, of a bf16 folder; what was pushed verifies as it lies there."""
    made = small_checkpoint(tmp_path / "small")
    mirrored(made, f"file://{tmp_path}/www")
    folder, _ = get(made, tmp_path / "out", BF16, named=(f"file://{tmp_path}/www",))
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_DEBUG": "1",
    }
    command = [sys.executable, "-m", "swarm.cli.main", "push", str(folder), URL, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{REPOSITORY}/commit/1" in done.stdout and "round 10, bf16" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files(REPOSITORY).items():
        (copy / name).write_bytes(content)
    report = verify_folder(copy, made.run_id)
    assert report.ok and report.files.dtype == BF16 and report.warnings == ()
