"""The door to hivemind: what is taken from it, made safe before anything of it runs.

Decides that its decoder is limited, its clock is the run's, and its log is quiet. Leaves what is done with it to
`peer.p2p.network`, which never lets its types through.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peer.p2p.directory import check_msgpack
from swarm.errors import ConfigError, NetworkError

_clock: Callable[[], float] | None = None


def _now() -> float:
    if _clock is None:
        raise NetworkError("the network has no clock yet")
    return _clock()


def load(clock: Callable[[], float], *, debug: bool) -> SimpleNamespace:
    """hivemind's public names, with its dangers removed before anything of it runs. Takes seconds the first time."""
    global _clock
    _clock = clock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = _names()
    if not hasattr(names.MSGPackSerializer, "_swarm_limited"):
        _limit_decoder(names.MSGPackSerializer)
        _replace_clock()
    importlib.import_module("hivemind.utils.logging").use_hivemind_log_handler("nowhere")
    # hivemind renames the level for everybody.
    logging.addLevelName(logging.WARNING, "WARNING")
    logging.getLogger("hivemind").setLevel(logging.DEBUG if debug else logging.CRITICAL + 1)
    return names


def _names() -> SimpleNamespace:
    _skip_rest()
    from hivemind.dht import node, protocol, routing, storage
    from hivemind.p2p import P2P, PeerID
    from hivemind.p2p.p2p_daemon_bindings import utils
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.multiaddr import Multiaddr
    from hivemind.utils.serializer import MSGPackSerializer

    return SimpleNamespace(
        DHTID=routing.DHTID,
        DHTNode=node.DHTNode,
        DictionaryDHTValue=storage.DictionaryDHTValue,
        MSGPackSerializer=MSGPackSerializer,
        Multiaddr=Multiaddr,
        P2P=P2P,
        P2PDaemonError=utils.P2PDaemonError,
        PeerID=PeerID,
        ValidationError=protocol.ValidationError,
        p2pd_pb2=p2pd_pb2,
        read_pbmsg_safe=utils.read_pbmsg_safe,
        write_pbmsg=utils.write_pbmsg,
    )


def _skip_rest() -> None:
    """Let hivemind's parts be imported without the package's own imports: averagers, experts and scipy, for nothing."""
    spec = importlib.util.find_spec("hivemind")
    if spec is not None and "hivemind" not in sys.modules:
        sys.modules["hivemind"] = importlib.util.module_from_spec(spec)


def _limit_decoder(serializer: Any) -> None:
    """Let hivemind decode only what `check_msgpack` has walked through."""
    original = serializer.loads.__func__

    def loads(cls: Any, buf: bytes) -> object:
        check_msgpack(buf)
        return original(cls, buf)

    serializer.loads = classmethod(loads)
    serializer._swarm_limited = True


def _replace_clock() -> None:
    """hivemind refuses peers whose clock is 3 s off; let it read the corrected clock wherever it took its own."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hivemind.") and hasattr(module, "get_dht_time"):
            module.get_dht_time = _now  # type: ignore[attr-defined]


def p2pd_binary() -> Path:
    spec = importlib.util.find_spec("hivemind")
    binary = Path(spec.origin or "").parent / "hivemind_cli" / "p2pd" if spec else Path()
    if not binary.is_file():
        raise ConfigError("hivemind's p2pd is not installed", "install hivemind from a wheel for this platform")
    return binary
