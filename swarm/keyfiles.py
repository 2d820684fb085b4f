"""Where keys lie on disk: one file per key, mode 0600, in the XDG data directory.

Leaves what a key means to `swarm.identity`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from swarm.errors import ConfigError
from swarm.identity import Identity


def data_home() -> Path:
    """``$XDG_DATA_HOME/swarmtrain`` (XDG base directory specification; default ``~/.local/share``)."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "swarmtrain"


def load_or_create(path: Path) -> Identity:
    """The identity in ``path``; a new one, written with mode 0600, where there is no file yet."""
    try:
        return load(path)
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = Identity.generate()
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(identity.libp2p_key())
            file.flush()
            os.fsync(file.fileno())
        # A link appears whole or not at all, and never replaces a key that another process made meanwhile.
        os.link(temporary, path)
    except FileExistsError:
        return load(path)
    finally:
        os.unlink(temporary)
    return identity


def load(path: Path) -> Identity:
    """The identity in ``path``. `FileNotFoundError` where there is none, `ConfigError` where it cannot be used."""
    raw = path.read_bytes()
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others", f"run: chmod 600 {path}")
    if len(raw) != 68:
        raise ConfigError(f"{path} is not an Ed25519 key file", "move it away; a new key is made on the next start")
    identity = Identity(raw[4:36])
    if identity.libp2p_key() != raw:
        raise ConfigError(f"{path} is damaged", "move it away; a new key is made on the next start")
    return identity
