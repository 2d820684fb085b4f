"""`swarm keys`: who governs a run, and which key publishes; changed by k of n organizers, each with a key of his own.

A change is a file. Whoever begins it (`add`, `revoke`, `rotate`) signs it too; the others `sign` it on their machines,
and `publish` puts it in force on the coordinator's machine once enough did. Leaves what a change may be to
`swarm.governance`, where files lie to `swarm.cli.governing`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import output

if TYPE_CHECKING:
    from swarm.governance import Change, Governance, Offline
    from swarm.identity import Identity
    from swarm.run_spec import RunSpec

app = typer.Typer(
    help="Show and change who governs a run, and which key publishes its checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file; its state folder lies beside it.")]
ChangeFile = Annotated[Path, typer.Argument(metavar="FILE", help="A change of keys.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the change is written.")]
Threshold = Annotated[int | None, typer.Option(min=1, max=32, help="How many organizers must sign from then on.")]
KeyText = Annotated[str, typer.Argument(metavar="KEY", help="An organizer's public key, 64 hexadecimal digits.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_DEFAULT_OUT = Path("keys-change.json")


@app.command("id")
def own_id(as_json: Json = False) -> None:
    """Print the public key of this machine's organizer; it is made the first time."""
    key = _organizer().public_key.hex()
    if as_json:
        output.print_json({"organizer_key": key})
    else:
        print(key)


@app.command("show")
def show(run_file: RunFile, as_json: Json = False) -> None:
    """Show who governs a started run, how many of them must sign, and which key publishes."""
    from swarm import governance

    _, _, offline = _run(run_file)
    said = governance.describe(offline.roots[-1])
    if as_json:
        output.print_json(_values(said))
        return
    own = _organizer().public_key
    rows = [("organizer", f"{key.hex()}{' (this machine)' if key == own else ''}") for key in said.organizers]
    output.table(f"root {said.version}, until {said.expires:%Y-%m-%d}", ("what", "value"), rows + _others(said))


@app.command("add")
def add(
    run_file: RunFile, key: KeyText, threshold: Threshold = None, out: Out = _DEFAULT_OUT, as_json: Json = False
) -> None:
    """Begin a change that lets another organizer govern, and sign it."""
    from swarm.errors import ConfigError

    new = _parse_key(key)

    def change(said: Governance) -> dict[str, Any]:
        if new in said.organizers or new == said.publication_key:
            raise ConfigError("this key has a part in the run already", "see: swarm keys show")
        return {"organizers": (*said.organizers, new)}

    _begin(run_file, change, threshold, out, as_json)


@app.command("revoke")
def revoke(
    run_file: RunFile, key: KeyText, threshold: Threshold = None, out: Out = _DEFAULT_OUT, as_json: Json = False
) -> None:
    """Begin a change after which an organizer's key counts no more, and sign it."""
    from swarm.errors import ConfigError

    old = _parse_key(key)

    def change(said: Governance) -> dict[str, Any]:
        if old not in said.organizers:
            raise ConfigError("no organizer of the run has this key", "see: swarm keys show")
        return {"organizers": tuple(item for item in said.organizers if item != old)}

    _begin(run_file, change, threshold, out, as_json)


@app.command("rotate")
def rotate(run_file: RunFile, threshold: Threshold = None, out: Out = _DEFAULT_OUT, as_json: Json = False) -> None:
    """Begin a change that replaces the publication key by a new one made here, and sign it."""
    from swarm.cli import governing

    def change(said: Governance) -> dict[str, Any]:
        key = governing.new_publisher(run_file.parent / "state", said.version + 1)
        return {"publication_key": key.public_key}

    _begin(run_file, change, threshold, out, as_json)


@app.command("sign")
def sign(file: ChangeFile, as_json: Json = False) -> None:
    """Read a change, and add the signature of this machine's organizer to its file; offline."""
    from swarm import governance
    from swarm.files import write_durably

    run_id, change = _read_change(file)
    change = governance.sign(change, _organizer())
    write_durably(file, change.to_json(run_id))
    _tell(run_id, change, None, file, as_json)


@app.command("publish")
def publish(run_file: RunFile, file: ChangeFile, as_json: Json = False) -> None:
    """Put a change in force that enough organizers signed; `swarm start` serves it from its next start on."""
    from swarm import governance
    from swarm.cli import governing
    from swarm.errors import ConfigError

    state, spec, offline = _run(run_file)
    run_id, change = _read_change(file)
    if run_id != spec.run_id:
        raise ConfigError("this change is of another run", "name the run file that it was begun with")
    adopted = governance.adopt(run_id, offline, change)
    said = governance.describe(change.root)
    governing.publisher(state, said.publication_key)
    governing.save(state, adopted)
    if as_json:
        output.print_json(_values(said))
    else:
        print(f"root {said.version} is in force; restart `swarm start {run_file}` so that it is served")


def _begin(
    run_file: Path, change: Callable[[Governance], dict[str, Any]], threshold: int | None, out: Path, as_json: bool
) -> None:
    from dataclasses import replace
    from datetime import datetime, timezone

    from swarm import governance
    from swarm.errors import ConfigError
    from swarm.files import write_durably

    _, spec, offline = _run(run_file)
    said = governance.describe(offline.roots[-1])
    wanted = replace(said, version=said.version + 1, threshold=threshold or said.threshold)
    wanted = replace(wanted, **change(said))
    if not 1 <= wanted.threshold <= len(wanted.organizers):
        raise ConfigError(
            f"{wanted.threshold} of {len(wanted.organizers)} organizers could never sign", "give another --threshold"
        )
    made = governance.propose(spec.run_id, wanted, offline.targets_version + 1, datetime.now(timezone.utc))
    made = governance.sign(made, _organizer())
    write_durably(out, made.to_json(spec.run_id))
    _tell(spec.run_id, made, offline.roots[-1], out, as_json)


def _tell(run_id: bytes, change: Change, before: bytes | None, file: Path, as_json: bool) -> None:
    """What the change says, and who may still sign it (``before`` None: of the organizers that it names alone)."""
    from swarm import governance

    said = governance.describe(change.root)
    waiting, missing = governance.missing_signatures(change, before)
    if as_json:
        more = {"missing": missing, "may_sign": [key.hex() for key in waiting]}
        output.print_json({"file": str(file), "run_id": run_id.hex(), **_values(said), **more})
        return
    rows = [("run", run_id.hex()), *(("organizer", key.hex()) for key in said.organizers), *_others(said)]
    rows += [("may still sign", key.hex()) for key in waiting]
    output.table(f"{file}: root {said.version}", ("what", "value"), rows)
    print(
        f"{missing} more must sign it: swarm keys sign {file}" if missing else "next: swarm keys publish RUN.toml FILE"
    )


def _run(run_file: Path) -> tuple[Path, RunSpec, Offline]:
    """The state folder, spec and keys of a run that was started here."""
    from swarm.cli import governing
    from swarm.cli.organizer import started_spec
    from swarm.errors import ConfigError

    state = run_file.parent / "state"
    spec = started_spec(state)
    offline = governing.load(state, spec)
    if offline is None:
        raise ConfigError(f"{state} holds no keys yet", f"start the run first: swarm start {run_file}")
    return state, spec, offline


def _organizer() -> Identity:
    from swarm import keyfiles

    return keyfiles.load_or_create(keyfiles.data_home() / "organizer.key")


def _read_change(file: Path) -> tuple[bytes, Change]:
    from swarm.errors import DataError
    from swarm.governance import Change

    try:
        return Change.from_json(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"there is no {file}", "begin a change with: swarm keys add, revoke or rotate") from error


def _parse_key(text: str) -> bytes:
    from swarm.errors import ConfigError

    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{text[:80]!r} is no public key", "ask the organizer for what `swarm keys id` prints")
    return key


def _others(said: Governance) -> list[tuple[str, str]]:
    threshold = f"{said.threshold} of {len(said.organizers)}"
    return [("must sign", threshold), ("publication key", said.publication_key.hex())]


def _values(said: Governance) -> dict[str, Any]:
    return {
        "root": said.version,
        "organizers": [key.hex() for key in said.organizers],
        "threshold": said.threshold,
        "publication_key": said.publication_key.hex(),
        "expires": said.expires.isoformat(),
    }
