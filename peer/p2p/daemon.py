"""Our side of p2pd: which flags it gets, its private folder of sockets, its start, its death, its end.

Decides how p2pd runs on a volunteer's machine: no port mapping, no relaying for others, limits from the operating
system, no output on our terminal. Leaves the process itself to `peer.p2p.p2pd_guard` and all talking to
`peer.p2p.network`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import ConfigError, DeadlineExceeded, NetworkError, PortInUse

logger = logging.getLogger(__name__)

# sun_path holds 108 bytes with the closing zero (unix(7)); hivemind's socket is p2pclient-XXXXXXXXXXX.sock.
_MAX_FOLDER_BYTES = 107 - len("/p2pclient-XXXXXXXXXXX.sock")
_FOLDER_NAME_BYTES = len("/swarm-XXXXXXXX")
_MAX_OPEN_FILES = 8192
_GUARD_EXIT_S = 2.5
_KEPT_LINES = 20
_MAX_LINE_CHARS = 2000
_MESSAGE_BYTES = 4 << 20
# The flag alone does not keep p2pd from relaying for everybody (`-relay=0` changes nothing): its settings do. Peers
# are dialled through relays all the same, as libp2p does so by default.
_SETTINGS = '{"Relay": {"Enabled": false}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """What p2pd is told. Addresses are multiaddrs."""

    binary: Path
    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    dht_server: bool = True
    # Go reserves far more address space than it uses; this stops a runaway, and GOMEMLIMIT asks for less before that.
    max_address_space_bytes: int = 8 << 30
    soft_memory_bytes: int = 512 << 20
    debug: bool = False


class Daemon:
    """A running p2pd. ``failed`` is set when it ended without being asked to."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.folder = folder
        self.failed = asyncio.Event()
        self._process = process
        self._closing = False
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read_output())

    @property
    def socket_path(self) -> Path:
        return self.folder / "p2pd.sock"

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once p2pd listens. Raises `PortInUse`, `DeadlineExceeded` or `NetworkError`."""
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded(f"p2pd was not ready within {timeout_s:.0f} s") from error

    async def close(self) -> None:
        """End p2pd and its guard, remove the folder. Never raises; takes at most a few seconds."""
        self._closing = True
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(asyncio.shield(self._reader), _GUARD_EXIT_S)
        except asyncio.TimeoutError:
            # The kernel ends p2pd with its guard.
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await asyncio.wait([self._reader], timeout=_GUARD_EXIT_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _read_output(self) -> None:
        """Read until p2pd and its guard have ended, so that p2pd never waits for a reader of its output."""
        stdout = self._process.stdout
        rest = b""
        while stdout is not None and (data := await stdout.read(1 << 16)):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:_MAX_LINE_CHARS]
            for line in lines:
                self._take_line(line[:_MAX_LINE_CHARS].decode(errors="replace").strip())
        self._take_line(rest.decode(errors="replace").strip())
        await self._process.wait()
        if not self._ready.done():
            self._ready.set_exception(_startup_error(list(self._last_lines)))
            self._ready.exception()
        if not self._closing:
            self.failed.set()

    def _take_line(self, line: str) -> None:
        if not line:
            return
        logger.debug("p2pd: %s", line)
        self._last_lines.append(line)
        if line.startswith("Peer ID:") and not self._ready.done():
            self._ready.set_result(None)


def make_folder(parent: Path | None, key: bytes) -> tuple[Path, Path]:
    """A fresh folder of mode 0700 for sockets, and the file in it (0600) that holds the libp2p private ``key``.

    Raises `ConfigError` where the path is too long for a unix socket.
    """
    parent = parent or Path("/tmp")
    if len(os.fsencode(parent)) + _FOLDER_NAME_BYTES > _MAX_FOLDER_BYTES:
        raise ConfigError(f"{parent} is too long a path for unix sockets", "choose a folder with a shorter path")
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = Path(tempfile.mkdtemp(prefix="swarm-", dir=parent))
    key_file = folder / "key"
    descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)
    (folder / "settings.json").write_text(_SETTINGS)
    return folder, key_file


async def start_daemon(config: DaemonConfig, folder: Path, key_file: Path) -> Daemon:
    """Start p2pd under its guard; the folder is removed with it. Follow with `Daemon.wait_ready`."""
    command = [
        *(sys.executable, "-I", "-S", str(Path(__file__).with_name("p2pd_guard.py"))),
        f"--socket-dir={folder}",
        f"--parent-pid={os.getpid()}",
        f"--max-open-files={_MAX_OPEN_FILES}",
        f"--max-address-space-bytes={config.max_address_space_bytes}",
        "--",
        *daemon_arguments(config, folder, key_file),
    ]
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TZ") if name in os.environ}
    environment |= {
        "GOLOG_LOG_LEVEL": "info" if config.debug else "fatal",
        "GOMEMLIMIT": str(config.soft_memory_bytes),
    }
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        # Ctrl-C on the terminal is for us alone: the network stays up while we say goodbye.
        start_new_session=True,
    )
    return Daemon(process, folder)


def daemon_arguments(config: DaemonConfig, folder: Path, key_file: Path) -> list[str]:
    """The command line of p2pd. Differs from hivemind's own in what a volunteer has not asked for."""
    flags: dict[str, object] = {
        # libp2p's own directory (not ours) finds addresses by peer id; who cannot be dialled only asks in it.
        "dhtServer" if config.dht_server else "dhtClient": 1,
        "id": key_file,
        "listen": f"/unix{folder}/p2pd.sock",
        "hostAddrs": ",".join(config.host_maddrs),
        "natPortMap": 0,
        # With it comes libp2p's own hole punching (docs/decisions/0019); who can be dialled seed peers find out.
        "autonat": 0,
        "autoRelay": 0,
        "f": folder / "settings.json",
        "relay": 0,
        "tls": 1,
        "connManager": 1,
        "idleTimeout": "60s",
        "persistentConnMaxMsgSize": _MESSAGE_BYTES,
    }
    if config.announce_maddrs:
        flags["announceAddrs"] = ",".join(config.announce_maddrs)
    return [str(config.binary), *(f"-{name}={value}" for name, value in flags.items())]


def _startup_error(lines: Sequence[str]) -> NetworkError | PortInUse:
    text = " | ".join(lines)[-500:] or "no output"
    if "address already in use" in text:
        return PortInUse(f"p2pd cannot listen: {text}", "choose another port, or stop what uses this one")
    return NetworkError(f"p2pd did not start: {text}")
