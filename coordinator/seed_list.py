"""Which further peers the organizer lets be seed peers: a file of peer ids, one a line, in the run's folder.

The coordinator reads it anew each time, so that a change needs no restart. Genesis voters need not be in it. What
seed peers may do beyond other peers is told in docs/decisions/0019.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swarm.errors import ConfigError, DataError
from swarm.files import write_durably
from swarm.identity import peer_id_of, public_key_of

FILE_NAME = "seeds.txt"
MAX_SEED_PEERS = 64


def read(path: Path | None) -> tuple[bytes, ...]:
    """Public keys of the peers on the list; none where there is no list. Raises `ConfigError`."""
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="ascii").split()
        return tuple(map(public_key_of, lines[:MAX_SEED_PEERS]))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise ConfigError(f"{path} is no list of peer ids, one a line: {error}", "mend it, or remove it") from error


def change(path: Path, add: Sequence[str], remove: Sequence[str]) -> tuple[bytes, ...]:
    """Write the list with some more and some fewer peer ids; what is on it then. Raises `ConfigError`."""
    try:
        more, fewer = set(map(public_key_of, add)), set(map(public_key_of, remove))
    except DataError as error:
        raise ConfigError(str(error), "`swarm seed` tells the peer id of its machine") from error
    old = read(path)
    if not fewer <= set(old) or more & fewer:
        raise ConfigError("only what is on the list is removed from it", "see it with: swarm seeds RUN.toml")
    new = tuple(sorted({*old, *more} - fewer))
    if len(new) > MAX_SEED_PEERS:
        raise ConfigError(f"at most {MAX_SEED_PEERS} further seed peers")
    if set(new) != set(old):
        write_durably(path, "".join(peer_id_of(key) + "\n" for key in new).encode())
    return new
