"""Bad input as a person meets it: every command says what, why and what to do, and uses nothing of it.

Commands run as processes, or through `swarm.cli.main` where they fail before they reach anybody. What peers send to
each other is in tests/simulation/test_hostile_peers.py; each part's own cases are in its unit tests.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from peer.home import Home, locked_identity
from swarm import invite as invites
from swarm import presets, run_file
from swarm.cli import main
from swarm.invite import Invite
from swarm.proto.common_pb2 import Signed
from tests.coordinator_server import coordinator, invite_to
from tests.coordinator_world import ORGANIZER, STRANGER, World
from tests.integration.processes import Program, assert_refused, end_all, environment, swarm, swarm_json

START_S, ROUNDS_S, LEAVE_S = 120.0, 90.0, 10.0
LIMITS = ("--threads", 1, "--duty", 30)
TEXT = Invite(run_id=b"r" * 20, tls_pin=b"t" * 32, addresses=("127.0.0.1:9",)).encode()

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, with its data in ``tmp_path / "xdg"`` and ``tmp_path`` as current folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), said.out, said.err)

    return run


# ---- invites, addresses, keys: before anybody is reached ------------------------------------------------------------

WITH_INVITE: dict[str, tuple[str, ...]] = {
    "join": (),
    "seed": ("--data", "nowhere"),
    "status": (),
    "checkpoints": (),
    "download": (),
}
BAD_INVITES = {
    "cut short": (TEXT[:-3], "cut short or mistyped"),
    "one character wrong": (TEXT[:20] + ("x" if TEXT[20] != "x" else "y") + TEXT[21:], "cut short or mistyped"),
    "something else": ("https://example.org", "starts with"),
    "empty": ("", "starts with"),
}


@pytest.mark.parametrize("command", WITH_INVITE)
@pytest.mark.parametrize("case", BAD_INVITES)
def test_a_bad_invite_is_refused_and_nothing_is_written(command: str, case: str, here: Run, tmp_path: Path) -> None:
    text, said = BAD_INVITES[case]
    assert_refused(here(command, text, *WITH_INVITE[command]), 65, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", WITH_INVITE)
def test_an_unreachable_coordinator_is_named_and_the_advice_is_what_to_check(command: str, here: Run) -> None:
    done = here(command, TEXT, *WITH_INVITE[command])
    assert_refused(done, 69, "no coordinator answers: 127.0.0.1:9")
    assert "check your connection" in done.stderr


@pytest.mark.parametrize("command", ["join", "seed"])
def test_a_second_process_with_the_same_key_is_refused_before_it_reaches_anybody(
    command: str, here: Run, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    with locked_identity(home) as identity:
        done = here(command, TEXT, "--home", home.folder, *WITH_INVITE[command])
    assert_refused(done, 75, str(home.key_path))
    with locked_identity(home) as again:
        assert again == identity


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", ":7001"])
def test_an_address_that_is_none_is_refused(listen: str, here: Run) -> None:
    assert_refused(here("join", TEXT, "--listen", listen), 78, "is not HOST:PORT")


# ---- a coordinator that lies ----------------------------------------------------------------------------------------


def _flip(data: bytes, at: int = -5) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def _spec_with_a_flipped_byte(world: World) -> dict[str, Any]:
    spec = world.source.spec
    return {"spec": Signed(signer=spec.signer, payload=_flip(spec.payload), signature=spec.signature)}


def _spec_of_another_key(world: World) -> dict[str, Any]:
    return {"spec": STRANGER.sign("run-spec", world.run_id, world.spec.canonical_bytes())}


def _spec_with_anothers_signature(world: World) -> dict[str, Any]:
    other = STRANGER.sign("run-spec", world.run_id, world.spec.canonical_bytes())
    payload = world.source.spec.payload
    return {"spec": Signed(signer=ORGANIZER.public_key, payload=payload, signature=other.signature)}


def _genesis_of_another_key(world: World) -> dict[str, Any]:
    return {"genesis": STRANGER.sign("genesis", world.run_id, world.source.genesis.payload)}


LIES: dict[str, tuple[Callable[[World], dict[str, Any]], int, str]] = {
    "spec with a flipped byte": (_spec_with_a_flipped_byte, 78, "not the one that the invite names"),
    "spec signed by another key": (_spec_of_another_key, 78, "not the one that the invite names"),
    "spec with another's signature": (_spec_with_anothers_signature, 76, "the signature does not verify"),
    "genesis signed by another key": (_genesis_of_another_key, 76, "signed by another key"),
    "manifest with a flipped byte": (lambda w: {"data_manifest": _flip(w.source.data_manifest)}, 76, "data manifest"),
    "tokenizer with a flipped byte": (lambda w: {"tokenizer": _flip(w.source.tokenizer)}, 76, "tokenizer"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_changed_run_is_refused_and_nothing_of_it_is_kept(case: str, tmp_path: Path) -> None:
    change, code, said = LIES[case]
    command = ("join", "--home", tmp_path / "home") if "spec" in case else ("checkpoints",)
    world = World()

    async def body() -> subprocess.CompletedProcess[str]:
        async with coordinator(world, tmp_path / "coordinator") as server:
            server._service._run = replace(server._service._run, source=replace(world.source, **change(world)))
            text = invite_to(world, server.port, server.tls_pin).encode()
            return await asyncio.to_thread(swarm, *command, text, env=environment(tmp_path))

    done = asyncio.run(asyncio.wait_for(body(), 120))
    assert_refused(done, code, said)
    assert done.stdout == ""
    assert {path.name for path in tmp_path.glob("home/*")} <= {"peer.key"}


# ---- a run that is alive --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Live:
    """A run with a seed peer, one published round and a downloaded checkpoint, and nobody else in it."""

    folder: Path
    run_file: Path
    invite: str
    checkpoint: Path

    @property
    def env(self) -> dict[str, str]:
        return environment(self.folder)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    env = environment(folder)
    sources = [Path(asyncio.__file__).parent, Path(asyncio.__file__).parents[1] / "json"]
    arguments = ("--vocab-size", 512, "--validation-fraction", 0.05, "--token-shard-tokens", 65536)
    done = swarm("data", "prepare", *sources, "--out", folder / "run" / "data", *arguments, env=env)
    assert done.returncode == 0, done.stderr
    values = presets.preset("tiny", "live").model_dump() | {"total_tokens": 10**9, "checkpoints": {"every_rounds": 1}}
    path = folder / "run" / run_file.FILE_NAME
    path.write_text(run_file.render(run_file.RunFile.model_validate(values)))
    programs = [Program(("start", path), folder / "start", env)]
    try:
        invite = programs[0].wait_news("started", START_S)["invite"]
        programs[0].wait_news("seed ready", START_S)
        programs.append(Program(("join", invite, "--home", folder / "first", *LIMITS), folder / "first-said", env))
        programs[0].wait_news("seed checkpoint", START_S + ROUNDS_S)
        assert programs[1].leave(signal.SIGTERM, LEAVE_S) == 0
        got = swarm_json("download", invite, "--out", folder / "got", env=env)
        yield Live(folder, path, invite, Path(got["folder"]))
    finally:
        end_all(programs)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["join", "status", "checkpoints", "download"])
def test_another_key_than_the_invites_is_refused_before_anything_is_said(
    command: str, live: Live, here: Run, tmp_path: Path
) -> None:
    wrong = replace(invites.parse(live.invite), tls_pin=b"p" * 32).encode()
    done = here(command, wrong)
    assert_refused(done, 76, "answers with another key than the invite's")
    assert "do not join" in done.stderr
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"peer.key"}


@pytest.mark.slow
def test_a_taken_port_is_named_by_every_command_that_listens(live: Live, tmp_path: Path) -> None:
    home = ("--home", tmp_path / "home")
    with taken_port() as port:
        listen = ("--listen", f"127.0.0.1:{port}")
        for arguments in (
            ("join", live.invite, *home, *listen),
            ("seed", live.invite, *home, *listen, "--data", live.run_file.parent / "data"),
            ("start", elsewhere(live, tmp_path / "run"), "--port", port),
        ):
            assert_refused(swarm(*arguments, env=live.env), 74, str(port))
        done = swarm("start", elsewhere(live, tmp_path / "again"), "--seed-port", port, env=live.env)
    assert_refused(done, 74, "the seed peer does not start")
    assert f"127.0.0.1:{port}" in done.stderr


def elsewhere(live: Live, folder: Path) -> Path:
    """A copy of the run's folder as its organizer has it, without the database and the seed peer; its run file."""
    shutil.copytree(live.run_file.parent, folder, ignore=shutil.ignore_patterns("*.sqlite*", "seed", "lock", "*port*"))
    return folder / live.run_file.name


@pytest.mark.slow
def test_a_second_coordinator_of_the_same_run_is_refused_and_the_first_goes_on(live: Live) -> None:
    assert_refused(swarm("start", live.run_file, env=live.env), 75, "another coordinator uses")
    assert swarm_json("status", live.invite, env=live.env)["round"] >= 1


@pytest.mark.slow
def test_a_missing_gpu_is_named_and_never_replaced(live: Live, here: Run) -> None:
    commands = (("join", live.invite), ("generate", live.checkpoint, "def main("))
    assert_refused(swarm(*commands[0], "--device", "cuda:99", env=live.env), 74, "no CUDA device 'cuda:99'")
    assert_refused(here(*commands[1], "--device", "cuda:99"), 74, "no CUDA device 'cuda:99'")
    assert_refused(here(*commands[1], "--device", "gpu"), 74, "'gpu' is no compute device")


DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "spec with a flipped byte": (lambda run: flip(run / "state" / "spec.sig"), 76, "spec.sig"),
    "spec cut short": (lambda run: cut(run / "state" / "spec.sig"), 76, "spec.sig"),
    "genesis with a flipped byte": (lambda run: flip(run / "state" / "genesis.sig"), 76, "genesis.sig"),
    "genesis cut short": (lambda run: cut(run / "state" / "genesis.sig"), 76, "genesis.sig"),
    "tokenizer with a flipped byte": (lambda run: flip(run / "data" / "tokenizer.json"), 76, "tokenizer"),
    "rules changed": (lambda run: replaced(run / "run.toml", "seed = 0", "seed = 1"), 78, "signed rules cannot change"),
    "an unknown key": (lambda run: replaced(run / "run.toml", "seed = 0", "sead = 0"), 78, "did you mean 'seed'?"),
    "no TOML": (lambda run: cut(run / "run.toml"), 78, "run.toml"),
}


def flip(path: Path) -> None:
    path.write_bytes(_flip(path.read_bytes(), at=len(path.read_bytes()) // 2))


def cut(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def replaced(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGE)
def test_an_organizers_damaged_file_is_named_and_nothing_is_served(case: str, live: Live, tmp_path: Path) -> None:
    damage, code, said = DAMAGE[case]
    path = elsewhere(live, tmp_path / "run")
    damage(path.parent)
    assert_refused(swarm("start", path, env=live.env), code, said)


CHECKPOINT_FILES = [
    *("config.json", "model.safetensors", "tokenizer.json"),
    *("swarm-manifest.json", "swarm-manifest.sig", "swarm-run-spec.sig"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_checkpoint_with_a_flipped_byte_is_refused_by_name(name: str, live: Live, here: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(live.checkpoint, tmp_path / "damaged"))
    flip(folder / name)
    done = here("verify", folder)
    assert_refused(done, 76, "")
    assert "right" not in done.stdout
    done = here("generate", folder, "def main(")
    assert_refused(done, 76, "")
    assert done.stdout == ""


@pytest.mark.slow
def test_a_download_repairs_a_flipped_byte(live: Live, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(live.checkpoint, tmp_path / "got" / live.checkpoint.name))
    flip(folder / "model.safetensors")
    number = int(live.checkpoint.name.removeprefix("round-"))
    swarm_json("download", f"{live.invite}@{number}", "--out", tmp_path / "got", env=live.env)
    assert (folder / "model.safetensors").read_bytes() == (live.checkpoint / "model.safetensors").read_bytes()


# ---- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Leave not one block free."""
    with open(disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(1 << 16)):
            pass
    assert shutil.disk_usage(disk).free == 0


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_data_preparation_with_nothing_left(small_disk: Path, tmp_path: Path) -> None:
    command = ("data", "prepare", Path(asyncio.__file__).parent, "--out", small_disk / "data", "--vocab-size", 512)
    assert_refused(swarm(*command, env=environment(tmp_path)), 74, "no space left")
    assert list(small_disk.iterdir()) == []
    enlarge(small_disk)
    assert swarm(*command, env=environment(tmp_path)).returncode == 0


@pytest.mark.slow
def test_a_full_disk_ends_a_join_which_goes_on_once_there_is_space(live: Live, small_disk: Path) -> None:
    """Before the state is there, and in the midst of training; the key stays the same."""
    command = ("join", live.invite, "--home", small_disk / "home", *LIMITS)
    assert_refused(swarm(*command, env=live.env), 74, "no space left")
    key = (small_disk / "home" / "peer.key").read_bytes()
    enlarge(small_disk)
    volunteer = Program(command, live.folder / "filled", live.env)
    try:
        before = volunteer.wait_news("commit", START_S + ROUNDS_S)["round"]
        fill(small_disk)
        assert volunteer.wait_exit(ROUNDS_S) == 74, volunteer.last_words()
        assert volunteer.errors.splitlines()[-2].startswith("error: no space left")
        assert "Traceback" not in volunteer.errors
        (small_disk / "filler").unlink()
        volunteer = Program(command, live.folder / "freed", live.env)
        volunteer.wait_news("commit", ROUNDS_S, lambda news: news["counted"] and news["round"] > before)
        assert volunteer.leave(signal.SIGTERM, LEAVE_S) == 0
    finally:
        end_all([volunteer])
    assert (small_disk / "home" / "peer.key").read_bytes() == key


@pytest.mark.slow
def test_a_full_disk_ends_a_download_which_resumes_once_there_is_space(live: Live, small_disk: Path) -> None:
    command = ("download", live.invite, "--out", small_disk / "got")
    assert_refused(swarm(*command, env=live.env), 74, "more bytes")
    enlarge(small_disk)
    assert swarm_json(*command, env=live.env)["ok"]
