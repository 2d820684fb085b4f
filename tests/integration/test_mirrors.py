"""Mirrors read by range: web server, folder and bucket give the same checkpoint, and nothing that they do harms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.checkpoint_files import PublishedFolder
from coordinator.mirroring import write_mirror
from peer.checkpoints.download import Order, download
from peer.checkpoints.filling import Fetching
from peer.checkpoints.mirrors import HttpMirror, StorageMirror, open_mirrors
from peer.checkpoints.sources import Chunk, Tally
from peer.p2p.fetch import FetchLimits
from swarm.errors import ConfigError, NetworkError, NotFound
from swarm.manifest import SIGNATURE_FILE
from swarm.storage import Storage
from tests.checkpoint_samples import SignedCheckpoint, make_parts, signed_checkpoint, small_checkpoint
from tests.mirror_servers import SECRETS, WebMirror, s3_server, web_mirror

QUICK = FetchLimits(per_holder=2, total=8, retry_pause_s=0)


@pytest.fixture
def made(tmp_path: Path) -> SignedCheckpoint:
    """Weights of three chunks."""
    return signed_checkpoint(tmp_path / "made", make_parts())


def mirrored(made: SignedCheckpoint, url: str) -> None:
    write_mirror(Storage(url), PublishedFolder(path=made.folder, manifest=made.manifest))


def get(made: SignedCheckpoint, out: Path, *urls: str, tally: Tally | None = None) -> Path:
    order = Order(run_id=made.run_id, signed_spec=made.signed_spec, publication=made.publication, target=out)

    async def body() -> Path:
        async with open_mirrors(urls, (), made.manifest.round) as found:
            fetching = Fetching(sources=found, limits=QUICK, tally=tally or Tally())
            return (await download(order, fetching)).folder

    return asyncio.run(asyncio.wait_for(body(), 60))


def same(made: SignedCheckpoint, folder: Path) -> bool:
    """Whether the folder holds the fp32 set and what signs it; a mirror's holds the bf16 set besides."""
    return {path.name: path.read_bytes() for path in made.folder.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
    }


@pytest.fixture
def web(made: SignedCheckpoint, tmp_path: Path) -> Iterator[WebMirror]:
    """A web server over a mirrored checkpoint."""
    mirrored(made, f"file://{tmp_path}/www")
    with web_mirror(tmp_path / "www") as mirror:
        yield mirror


def test_a_folder_is_a_mirror(made: SignedCheckpoint, tmp_path: Path) -> None:
    mirrored(made, f"file://{tmp_path}/www")
    assert same(made, tmp_path / "www" / "checkpoint-10")
    assert same(made, get(made, tmp_path / "out", f"file://{tmp_path}/www"))


def test_a_web_server_is_asked_for_each_chunk_by_its_range(
    made: SignedCheckpoint, web: WebMirror, tmp_path: Path
) -> None:
    tally = Tally()
    assert same(made, get(made, tmp_path / "out", web.url, tally=tally))
    assert tally.by_kind() == {"mirrors": made.manifest.size_bytes}
    weights = [(first, last) for path, first, last in web.ranges if path.endswith("model.safetensors")]
    size = (made.folder / "model.safetensors").stat().st_size
    assert sorted(weights) == [(0, (4 << 20) - 1), (4 << 20, (8 << 20) - 1), (8 << 20, size - 1)]


def test_a_bucket_is_written_and_read(made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a server that speaks S3, with credentials that it takes for some."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        Storage("s3://bucket")._files.mkdir("bucket")
        mirrored(made, "s3://bucket/runs/sample")
        tally = Tally()
        assert same(made, get(made, tmp_path / "out", "s3://bucket/runs/sample", tally=tally))
        assert tally.by_kind() == {"mirrors": made.manifest.size_bytes}
        with pytest.raises(NotFound, match="lacks it"):
            get(made, tmp_path / "again", "s3://bucket/nothing")
        storage = Storage("s3://bucket/runs/sample/checkpoint-10")
        assert storage.size("config.json") == (made.folder / "config.json").stat().st_size
        assert storage.size("absent.json") is None


def test_a_bucket_that_the_coordinator_told_does_not_learn_whose_machine_asks(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    mirrored(made, f"file://{tmp_path}/bucket")
    raw = (made.folder / "config.json").read_bytes()

    async def read(*, named: tuple[str, ...] = (), told: tuple[str, ...] = ()) -> bytes:
        async with open_mirrors(named, told, made.manifest.round) as (mirror,):
            return await mirror.file("config.json", len(raw))

    with web_mirror(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        type(Storage("s3://bucket")._files).clear_instance_cache()  # it may remember another test's server
        assert asyncio.run(read(told=("s3://bucket",))) == raw
        assert server.ranges and not server.passwords
        assert asyncio.run(read(named=("s3://bucket",))) == raw
        assert server.passwords, "a bucket that the person named may be a private one"


SPOILT: dict[str, Callable[[WebMirror], None]] = {
    "wrong bytes": lambda mirror: setattr(mirror, "spoil", lambda data: bytes(len(data))),
    "too few bytes": lambda mirror: setattr(mirror, "spoil", lambda data: data[: len(data) // 2]),
    "endless bytes": lambda mirror: setattr(mirror, "spoil", lambda data: data + bytes(64 << 20)),
    "no ranges": lambda mirror: setattr(mirror, "status", 200),
    "refuses": lambda mirror: setattr(mirror, "status", 403),
    "is broken": lambda mirror: setattr(mirror, "status", 500),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_a_bad_mirror_lacks_or_lies_about_comes_from_another(
    case: str, made: SignedCheckpoint, web: WebMirror, tmp_path: Path
) -> None:
    SPOILT[case](web)
    assert same(made, get(made, tmp_path / "out", web.url, f"file://{tmp_path}/www"))


@pytest.mark.parametrize("case", SPOILT)
def test_a_bad_mirror_alone_gives_nothing_and_is_given_up(
    case: str, made: SignedCheckpoint, web: WebMirror, tmp_path: Path
) -> None:
    SPOILT[case](web)
    with pytest.raises(NotFound, match="nobody brought"):
        get(made, tmp_path / "out", web.url)
    assert not (tmp_path / "out" / "round-000010").exists()


def test_a_mirror_that_is_not_there_is_given_up(made: SignedCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="could not be reached"):
        get(made, tmp_path / "out", "http://127.0.0.1:9")


def test_a_half_written_mirror_gives_what_it_has_and_no_more(made: SignedCheckpoint, tmp_path: Path) -> None:
    mirrored(made, f"file://{tmp_path}/www")
    half = tmp_path / "www" / "checkpoint-10" / "model.safetensors"
    half.write_bytes(half.read_bytes()[: 6 << 20])
    with pytest.raises(NotFound, match="lacks it"):
        get(made, tmp_path / "out", f"file://{tmp_path}/www")
    mirrored(made, f"file://{tmp_path}/other")
    assert same(made, get(made, tmp_path / "out", f"file://{tmp_path}/www", f"file://{tmp_path}/other"))


@pytest.mark.parametrize("url", ["nowhere", "", "zip::file:///x.zip", "gopher://host/x", "s4://bucket/x"])
def test_a_url_that_is_no_mirror_is_a_config_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no place for files|not known"):
        get(small_checkpoint(tmp_path / "made"), tmp_path / "out", url)


@pytest.mark.parametrize("url", ["https://host/x?key=1", "https://host/x#", "https://me:word@host/x", "http://[broken"])
def test_a_named_url_that_no_file_can_follow_is_a_config_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no password|no URL"):
        get(small_checkpoint(tmp_path / "made"), tmp_path / "out", url)


def test_no_mirror_gets_a_password_of_this_machine(
    made: SignedCheckpoint, web: WebMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    get(made, tmp_path / "out", web.url)
    assert web.ranges and web.passwords == []


@pytest.mark.parametrize("is_named", [True, False])
def test_only_a_mirror_that_the_person_named_may_send_on_to_another_place(
    is_named: bool, made: SignedCheckpoint, web: WebMirror, tmp_path: Path
) -> None:
    with web_mirror(tmp_path / "nothing") as sender:
        sender.sends_on_to = web.url

        async def first_piece() -> bytes:
            named, told = ([sender.url], []) if is_named else ([], [sender.url])
            async with open_mirrors(named, told, made.manifest.round) as found:
                chunk = Chunk(digest=b"", file="config.json", offset=0, length=4)
                return await anext(found[0].read(chunk, 0))

        if is_named:
            assert asyncio.run(first_piece()) == (made.folder / "config.json").read_bytes()[:4]
        else:
            with pytest.raises(NetworkError, match="302"):
                asyncio.run(first_piece())
            assert web.ranges == []


def test_a_proxy_that_the_environment_names_is_used(
    made: SignedCheckpoint, web: WebMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(NotFound, match="could not be reached"):
        get(made, tmp_path / "out", web.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert same(made, get(made, tmp_path / "out", web.url))


TOLD = [
    *("http://host/runs", "https://host", "file:///etc", "local:///etc", "/etc", "simplecache::https://host/x"),
    *("https://", "https://host/\x1b[2J", "https://" + "h" * 2000, "memory://x", "http://[broken", "ftp://host/x"),
    *("http://host/do?what=", "http://host/do?", "http://host/do#", "http://name:word@host/", "http://host\\@other/x"),
    *("s3://host/x?versionId=1", "hf://host@name/x"),
]


def test_a_coordinator_cannot_make_us_read_our_own_files_or_open_odd_places() -> None:
    async def names() -> list[str]:
        async with open_mirrors((), TOLD, 10) as found:
            return [source.name for source in found]

    assert asyncio.run(names()) == ["http://host/runs/checkpoint-10", "https://host/checkpoint-10"]


def test_mirrors_are_bounded_in_number() -> None:
    async def kinds() -> list[type]:
        urls = [f"https://host-{number}" for number in range(100)]
        async with open_mirrors(["file:///x", "file:///x"], urls, 10) as found:
            return [type(source) for source in found]

    assert asyncio.run(kinds()) == [StorageMirror] + [HttpMirror] * 15


# ---- writing --------------------------------------------------------------------------------------------------------


def test_the_signature_is_written_last(made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = Storage.write
    monkeypatch.setattr(Storage, "write", lambda self, name, path: (written.append(name), real(self, name, path)))
    (made.folder / "notes.json").write_text("{}")
    mirrored(made, f"file://{tmp_path}/www")
    names = [name.removeprefix("checkpoint-10/") for name in written]
    assert names[-1] == SIGNATURE_FILE
    both = [path.name for path in made.folder.iterdir()] + [f"bf16/{file.name}" for file in made.manifest.bf16]
    assert sorted(names) == sorted(both)
    assert names.index("notes.json") > max(names.index(file.name) for file in made.manifest.files)


def test_writing_that_was_cut_short_goes_on_and_leaves_no_signature_before(
    made: SignedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = Storage.write, iter([True] * 3)

    def full(self: Storage, name: str, path: Path) -> None:
        if not next(room, False):
            raise ConfigError("the target is full")
        real(self, name, path)

    monkeypatch.setattr(Storage, "write", full)
    with pytest.raises(ConfigError):
        mirrored(made, f"file://{tmp_path}/www")
    there = {path.name for path in (tmp_path / "www" / "checkpoint-10").rglob("*") if path.is_file()}
    assert len(there) == 3 and SIGNATURE_FILE not in there
    monkeypatch.undo()
    mirrored(made, f"file://{tmp_path}/www")
    assert same(made, tmp_path / "www" / "checkpoint-10")
