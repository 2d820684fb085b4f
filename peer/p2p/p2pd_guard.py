"""Keeps one p2pd process, and makes sure that nothing of it outlives the program that asked for it.

Runs as a process of its own (standard library only, ``python -I -S``) between a peer and p2pd. It decides when p2pd
has to end: when the peer's end of the standard input closes or the peer is gone, however it died. Then it kills p2pd
and removes the folder of sockets. Should the guard itself be killed, the kernel kills p2pd (Linux). It leaves what
p2pd is told to do to `peer.p2p.daemon`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
# How often the parent's process id is looked at: a forked sibling may hold our standard input open after its death.
_PARENT_CHECK_S = 1.0
_KILL_AFTER_S = 1.0


def main() -> int:
    """Run p2pd until it ends or its user is gone; its exit status, or 1 where it was ended from outside."""
    arguments = _parse()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        return _keep(arguments)
    finally:
        shutil.rmtree(arguments.socket_dir, ignore_errors=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket-dir", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--max-open-files", type=int, required=True)
    parser.add_argument("--max-address-space-bytes", type=int, default=0)
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def _keep(arguments: argparse.Namespace) -> int:
    # p2pd holds the write end for as long as it lives, so the read end tells of its death at once.
    alive, held = os.pipe()
    guard_pid = os.getpid()

    def in_child() -> None:
        _die_with(guard_pid)
        _limit(arguments.max_open_files, arguments.max_address_space_bytes)

    # The guard has one thread, so running Python between fork and exec is safe here.
    daemon = subprocess.Popen(arguments.command, stdin=subprocess.DEVNULL, pass_fds=(held,), preexec_fn=in_child)
    os.close(held)
    try:
        _wait(alive, arguments.parent_pid)
    finally:
        _end(daemon)
    return daemon.returncode if daemon.returncode > 0 else 1


def _wait(alive: int, parent_pid: int) -> None:
    """Return once p2pd has ended, our standard input has closed, or the parent is another one."""
    while os.getppid() == parent_pid:
        readable, _, _ = select.select([sys.stdin.fileno(), alive], [], [], _PARENT_CHECK_S)
        if readable:
            return


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(_KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(_KILL_AFTER_S)


def _die_with(parent_pid: int) -> None:
    """In the child: let the kernel kill this process when the guard ends, even by SIGKILL (prctl(2), Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def _limit(max_open_files: int, max_address_space_bytes: int) -> None:
    """In the child: p2pd sets no limits of its own, so the operating system does."""
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_NOFILE, max_open_files)
    if max_address_space_bytes:
        _set_limit(resource.RLIMIT_AS, max_address_space_bytes)


def _set_limit(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (value, value))


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
