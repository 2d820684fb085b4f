"""The libp2p transport: the contract, and what only real processes can show."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from peer.p2p.network import Network, NetworkConfig, open_network
from peer.p2p.reachability import DIAL_BACK_METHOD
from peer.p2p.transport import Transport
from swarm.errors import ConfigError, NetworkError, NotFound, PortInUse, ProtocolError, Unreachable
from swarm.identity import Identity
from tests.contract_transport import KEY, OTHER_KEY, TransportContract, echo

RUN_ID = b"integration-test-run"


def config(*, seeds: Sequence[str] = (), clock: Callable[[], float] = time.time, **other: object) -> NetworkConfig:
    values = {"run_id": RUN_ID, "directory_keys": (KEY, OTHER_KEY), "clock": clock, "initial_peers": tuple(seeds)}
    return NetworkConfig(**{**values, **other})  # type: ignore[arg-type]


async def open_several(count: int, clock: Callable[[], float] = time.time) -> list[Network]:
    networks = [await open_network(config(clock=clock), Identity.generate())]
    try:
        for _ in range(count - 1):
            networks.append(await open_network(config(seeds=networks[0].addresses, clock=clock), Identity.generate()))
    except BaseException:
        for network in networks:
            await network.close()
        raise
    return networks


def check(count: int, scenario: Callable[[list[Network]], Awaitable[None]]) -> None:
    async def whole() -> None:
        networks = await open_several(count)
        try:
            await asyncio.wait_for(scenario(networks), 60)
        finally:
            for network in reversed(networks):
                await network.close()

    asyncio.run(whole())


def p2pd_processes() -> set[int]:
    """Process ids of p2pd and its guard among everything below this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("p2pd" in word for word in process.cmdline()):
                found.add(process.pid)
    return found


def wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name (pytest's own may not)."""
    with tempfile.TemporaryDirectory(prefix="net-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test leaves a process behind, or an exception that nobody looked at."""
    yield
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    assert wait_until(lambda: not p2pd_processes())


class TestNetworkContract(TransportContract):
    async def make(self, count: int) -> list[Transport]:
        return list(await open_several(count))


def test_a_closed_network_leaves_no_process_no_folder_and_no_task(short_path: Path) -> None:
    async def scenario() -> None:
        network = await open_network(config(socket_dir=short_path), Identity.generate())
        other = await open_network(config(seeds=network.addresses, socket_dir=short_path), Identity.generate())
        await network.serve("echo", echo)
        await other.call(network.public_key, "echo", b"x", timeout_s=10)
        assert len(os.listdir(short_path)) == 2
        started = time.monotonic()
        await other.close()
        await network.close()
        await network.close()
        assert time.monotonic() - started < 3
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
    assert list(short_path.iterdir()) == []
    assert p2pd_processes() == set()


def test_a_peer_keeps_its_upload_limit_and_knows_its_uplink_by_it() -> None:
    """Two large requests side by side, a third beside them that is small: it does not wait for them."""
    limit_bps, size = 80_000_000, 6 << 20

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            receiver = await open_network(config(), Identity.generate())
            stack.push_async_callback(receiver.close)
            limited = config(seeds=receiver.addresses, upload_limit_bps=limit_bps)
            sender = await open_network(limited, Identity.generate())
            stack.push_async_callback(sender.close)
            await receiver.serve("take", take)
            assert sender.uplink_bps() is None
            started = time.monotonic()
            large = [sender.call(receiver.public_key, "take", bytes(size), timeout_s=30) for _ in range(2)]
            sending = asyncio.gather(*large)
            await asyncio.sleep(0.1)
            await sender.call(receiver.public_key, "take", b"x", timeout_s=30)
            small_s = time.monotonic() - started
            await sending
            # All but the last frame of each have waited for their turn.
            least_s = 8 * (2 * size - 2 * (1 << 20)) / limit_bps
            assert time.monotonic() - started > least_s > small_s
            assert sender.uplink_bps() is not None and sender.uplink_bps() <= 1.25 * limit_bps  # type: ignore[operator]

    asyncio.run(scenario())


async def take(caller: bytes, request: bytes) -> bytes:
    return b""


def test_closing_ends_a_call_that_is_being_served() -> None:
    async def scenario(networks: list[Network]) -> None:
        entered = asyncio.Event()

        async def hang(caller: bytes, request: bytes) -> bytes:
            entered.set()
            await asyncio.sleep(3600)
            return b""

        await networks[1].serve("hang", hang)
        call = asyncio.create_task(networks[0].call(networks[1].public_key, "hang", b"", timeout_s=30))
        await asyncio.wait_for(entered.wait(), 10)
        await networks[1].close()
        with pytest.raises(Unreachable):
            await asyncio.wait_for(call, 10)

    check(2, scenario)


def test_a_handler_ends_with_its_callers_patience() -> None:
    async def scenario(networks: list[Network]) -> None:
        ended = asyncio.Event()

        async def hang(caller: bytes, request: bytes) -> bytes:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()
            return b""

        await networks[1].serve("hang", hang)
        with pytest.raises(NetworkError):
            await networks[0].call(networks[1].public_key, "hang", b"", timeout_s=0.5)
        await asyncio.wait_for(ended.wait(), 5)

    check(2, scenario)


def test_a_peer_can_call_itself() -> None:
    async def scenario(networks: list[Network]) -> None:
        await networks[0].serve("echo", echo)
        assert await networks[0].call(networks[0].public_key, "echo", b"me", timeout_s=5) == b"me"

    check(1, scenario)


CHILD = """
import asyncio, sys, time
from pathlib import Path
from peer.p2p.network import NetworkConfig, open_network
from swarm.identity import Identity
from tests.contract_transport import echo

async def main(folder, skew_s):
    config = NetworkConfig(run_id={run_id!r}, clock=lambda: time.time() + skew_s, directory_keys={keys!r},
                           socket_dir=Path(folder))
    network = await open_network(config, Identity.generate())
    await network.serve("echo", echo)
    print(network.addresses[0], flush=True)
    await asyncio.sleep(60)

asyncio.run(main(sys.argv[1], float(sys.argv[2])))
"""


@contextlib.contextmanager
def child_network(folder: Path, skew_s: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process with a network of the run, and its address."""
    code = CHILD.format(run_id=RUN_ID, keys=(KEY, OTHER_KEY))
    command = [sys.executable, "-c", code, str(folder), str(skew_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            address = child.stdout.readline().strip() if child.stdout else ""
            assert address, child.stderr.read() if child.stderr else ""
            yield child, address
        finally:
            child.kill()


def test_after_sigkill_no_process_and_no_folder_remains(short_path: Path) -> None:
    with child_network(short_path) as (child, _):
        below = {process.pid for process in psutil.Process(child.pid).children(recursive=True)}
        assert len(below) == 2 and len(list(short_path.iterdir())) == 1
        os.kill(child.pid, signal.SIGKILL)
        child.wait(10)
        assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in below))
        assert wait_until(lambda: not list(short_path.iterdir()))


def test_after_sigkill_of_the_guard_p2pd_ends_too_and_the_network_says_so(short_path: Path) -> None:
    async def scenario() -> None:
        network = await open_network(config(socket_dir=short_path), Identity.generate())
        try:
            assert network.alive
            guard = next(process for process in psutil.Process().children() if process.pid in p2pd_processes())
            guard.kill()
            await asyncio.wait_for(network.wait_failed(), 10)
            assert not network.alive
            with pytest.raises(Unreachable):
                await network.call(Identity(b"x" * 32).public_key, "echo", b"", timeout_s=5)
        finally:
            await network.close()

    asyncio.run(scenario())
    assert list(short_path.iterdir()) == []


def test_the_death_of_p2pd_is_noticed() -> None:
    async def scenario(networks: list[Network]) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.name() == "p2pd":
                process.kill()
        await asyncio.wait_for(networks[0].wait_failed(), 5)
        assert not networks[0].alive

    check(1, scenario)


def test_a_restarted_seed_peer_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.p2p.network._SEED_CHECK_S", 0.5)

    async def scenario() -> None:
        seed_identity = Identity.generate()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            seed_config = config(host_maddrs=(f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}",))
        seed = await open_network(seed_config, seed_identity)
        peer = await open_network(config(seeds=seed.addresses), Identity.generate())
        try:
            await seed.close()
            # The first lookup notices the death, so that the seed leaves the routing table.
            await peer.lookup(KEY)
            seed = await open_network(seed_config, seed_identity)

            async def found() -> bool:
                with contextlib.suppress(NetworkError):
                    await seed.publish(KEY, b"back", lifetime_s=60)
                    return seed.public_key in await peer.lookup(KEY)
                return False

            for _ in range(100):
                if is_back := await found():
                    break
                await asyncio.sleep(0.1)
            assert is_back
        finally:
            await peer.close()
            await seed.close()

    asyncio.run(scenario())


def test_a_taken_port_is_named(short_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            asyncio.run(
                open_network(
                    config(host_maddrs=(f"/ip4/127.0.0.1/tcp/{port}",), socket_dir=short_path), Identity.generate()
                )
            )
    assert list(short_path.iterdir()) == []


def test_an_absent_seed_peer_is_unreachable() -> None:
    absent = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity(b'a' * 32).peer_id}"
    with pytest.raises(Unreachable):
        asyncio.run(open_network(config(seeds=[absent]), Identity.generate()))


def test_a_seed_peer_starts_while_all_others_are_away() -> None:
    """It is the first one to come back: a newcomer reaches it."""
    absent = "/ip4/127.0.0.1/tcp/1/p2p/" + Identity.generate().peer_id

    async def scenario() -> None:
        seed = await open_network(config(seeds=[absent], relay_for=lambda caller, proof: None), Identity.generate())
        peer = await open_network(config(seeds=[absent, *seed.addresses]), Identity.generate())
        try:
            await peer.connect(seed.public_key, (), timeout_s=5)
        finally:
            await peer.close()
            await seed.close()

    asyncio.run(scenario())


def test_only_a_relay_dials_back() -> None:
    """A volunteer sees at its own address whom it let through its router: its answer would tell its own open ports."""

    async def scenario() -> None:
        relay = await open_network(config(relay_for=lambda caller, proof: None), Identity.generate())
        volunteer = await open_network(config(seeds=relay.addresses, proof=lambda: b""), Identity.generate())
        port = volunteer.addresses[0].split("/")[4]
        try:
            request = int(port).to_bytes(2, "big")
            answer = await volunteer.call(relay.public_key, DIAL_BACK_METHOD, request, timeout_s=5)
            assert answer == f"/ip4/127.0.0.1/tcp/{port}".encode()
            with pytest.raises(NotFound):
                await relay.call(volunteer.public_key, DIAL_BACK_METHOD, request, timeout_s=5)
        finally:
            await volunteer.close()
            await relay.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "wrong", [{"initial_peers": ("/ip4/127.0.0.1/tcp/1",)}, {"host_maddrs": ()}, {"startup_timeout_s": 0.0}], ids=str
)
def test_a_wrong_setting_is_a_config_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        config(**wrong)


def test_a_folder_too_long_for_a_socket_is_a_config_error(short_path: Path) -> None:
    with pytest.raises(ConfigError):
        asyncio.run(open_network(config(socket_dir=short_path / ("x" * 90)), Identity.generate()))


def test_a_key_beside_the_directorys_own_is_refused() -> None:
    async def scenario(networks: list[Network]) -> None:
        with pytest.raises(ProtocolError):
            await networks[0].publish("elsewhere", b"x", lifetime_s=10)
        with pytest.raises(ProtocolError):
            await networks[0].lookup("elsewhere")
        with pytest.raises(ProtocolError):
            await networks[0].publish(KEY, b"x", lifetime_s=601)

    check(1, scenario)


def test_both_peers_follow_the_corrected_clock_not_the_machines(short_path: Path) -> None:
    """A peer whose machine is an hour off takes part once its clock is corrected, and is refused before."""
    with child_network(short_path, skew_s=3600.0) as (_, address):

        async def scenario() -> None:
            ahead = await open_network(config(seeds=[address], clock=lambda: time.time() + 3600.0), Identity.generate())
            try:
                await ahead.publish(KEY, b"x", lifetime_s=30)
                assert dict(await ahead.lookup(KEY)) == {ahead.public_key: b"x"}
            finally:
                await ahead.close()
            with pytest.raises(NetworkError, match="local time"):
                await open_network(config(seeds=[address]), Identity.generate())

        asyncio.run(scenario())


def _nested(depth: int) -> bytes:
    raw = b"\x01"
    for _ in range(depth):
        raw = b"\xc9" + len(raw).to_bytes(4, "big") + b"\x40" + raw
    return raw


def test_a_deeply_nested_message_does_not_end_a_node() -> None:
    async def scenario(networks: list[Network]) -> None:
        from hivemind.proto import dht_pb2
        from hivemind.utils.serializer import MSGPackSerializer

        with pytest.raises(ProtocolError):
            MSGPackSerializer.loads(_nested(40))
        protocol = networks[1]._dht.node.protocol
        for nested in (_nested(40), _nested(5000), b"\x91" * 100_000):
            request = dht_pb2.StoreRequest(
                keys=[bytes(20)], subkeys=[b""], values=[nested], expiration_time=[time.time() + 60], in_cache=[False]
            )
            with pytest.raises(Exception, match="items or 32 levels"):
                await protocol.get_stub(networks[0]._p2p.peer_id).rpc_store(request, timeout=5)
        await networks[0].publish(KEY, b"alive", lifetime_s=30)
        assert dict(await networks[1].lookup(KEY)) == {networks[0].public_key: b"alive"}

    check(2, scenario)


def test_a_hostile_node_cannot_place_hide_or_prolong_records() -> None:
    """By hivemind's own calls, past our checks at the sender."""

    async def scenario(networks: list[Network]) -> None:
        from hivemind.dht.routing import DHTID

        honest, hostile = networks
        await honest.publish(KEY, b"honest", lifetime_s=30)
        protocol, directory = hostile._dht.node.protocol, hostile._dht._directory
        target, key_id = honest._p2p.peer_id, DHTID.generate(directory.full_key(KEY))
        far = time.time() + 400
        me, dumps = hostile.public_key, protocol.serializer.dumps
        mine = dumps(directory.seal(hostile._identity, KEY, b"mine", far))
        stolen = dumps(honest._dht._directory.seal(honest._identity, KEY, b"honest", far - 1))
        attempts = [
            ("unsigned", key_id, b"junk", far, me, False),
            ("far expiry", key_id, mine, time.time() + 1e6, me, False),
            ("expiry other than signed", key_id, stolen, far, honest.public_key, False),
            ("slot of another peer", key_id, mine, far, honest.public_key, False),
            ("no slot, over the whole key", key_id, mine, far, None, False),
            ("under a foreign key", DHTID.generate(b"foreign"), mine, far, me, False),
            ("in the cache", key_id, mine, far, me, True),
        ]
        for name, key, value, expires, subkey, in_cache in attempts:
            accepted = await protocol.call_store(target, [key], [value], expires, [subkey], in_cache)
            assert not accepted or not accepted[0], name
        assert dict(await honest.lookup(KEY)) == {honest.public_key: b"honest"}
        assert await protocol.call_store(target, [key_id], [mine], far, [me], False) == [True]

    check(2, scenario)


def test_records_of_another_run_are_not_believed() -> None:
    async def scenario() -> None:
        ours = await open_network(config(), Identity.generate())
        theirs = await open_network(config(seeds=ours.addresses, run_id=b"some-other-run"), Identity.generate())
        try:
            await theirs.publish(KEY, b"x", lifetime_s=30)
            assert dict(await ours.lookup(KEY)) == {}
            assert dict(await theirs.lookup(KEY)) == {theirs.public_key: b"x"}
            assert len(ours._dht.node.protocol.storage) == 0
        finally:
            await theirs.close()
            await ours.close()

    asyncio.run(scenario())


def test_hivemind_keeps_out_of_logging_and_of_the_event_loop(capfd: pytest.CaptureFixture[str]) -> None:
    def handlers(name: str | None = None) -> list[logging.Handler]:
        """All but pytest's own, which come and go, also at loggers that do not propagate."""
        return [h for h in logging.getLogger(name).handlers if not type(h).__module__.startswith("_pytest")]

    before = handlers()

    async def scenario(networks: list[Network]) -> None:
        with pytest.raises(NetworkError):
            await networks[0].call(Identity(b"n" * 32).public_key, "echo", b"", timeout_s=5)
        assert type(asyncio.get_running_loop()).__module__.startswith("asyncio")

    check(2, scenario)
    assert handlers() == before
    assert handlers("hivemind") == []
    assert logging.getLevelName(logging.WARNING) == "WARNING"
    assert capfd.readouterr() == ("", "")


def test_p2pd_runs_under_limits_and_serves_no_strangers() -> None:
    async def scenario(networks: list[Network]) -> None:
        p2pd = next(process for process in psutil.Process().children(recursive=True) if process.name() == "p2pd")
        assert {"-relay=0", "-natPortMap=0"} <= set(p2pd.cmdline())
        assert p2pd.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert p2pd.rlimit(psutil.RLIMIT_NOFILE)[1] <= 8192
        assert p2pd.rlimit(psutil.RLIMIT_AS)[1] == 8 << 30
        folder = networks[0]._daemon.folder
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "key").stat().st_mode & 0o777 == 0o600

    check(1, scenario)
