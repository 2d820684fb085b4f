"""`swarm join`, `start`, `seed`, `status`: taking part in a run, from every side.

Only wiring: options become the dataclasses of `peer` and `coordinator`, news become lines. Everything heavy is imported
when a command runs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli import words
from swarm.errors import ConfigError

if TYPE_CHECKING:
    from peer.runtime import News
    from swarm.invite import Invite
    from swarm.proto.coordinator_pb2 import GetProgressReply

InviteText = Annotated[str, typer.Argument(metavar="INVITE", help="The string that the organizer shared.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Listen = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Where peers reach this one, 0.0.0.0:0 behind a router.")
]
Announce = Annotated[str, typer.Option(metavar="HOST:PORT", help="What others are told to dial, if not --listen.")]
PARENT_CHECK_S = 1.0
MAX_ROWS = 30


def join(
    invite: InviteText,
    home: Annotated[Path | None, typer.Option(help="Folder for the key and all data of this peer.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Most memory for training: 4GiB; else all free.")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for training.")] = None,
    duty: Annotated[float, typer.Option(min=1, max=100, help="Largest share of time spent training, %.")] = 100,
    disk: Annotated[float, typer.Option(min=0.1, help="Disk limit, GiB.")] = 50,
    upload: Annotated[
        float | None, typer.Option(min=0.1, help="Upload limit, Mbit/s; else what the line gives.")
    ] = None,
    name: Annotated[str, typer.Option(help="What model cards call you; else you are not named.")] = "",
    listen: Listen = "127.0.0.1:0",
    announce: Announce = "",
    json_lines: Annotated[bool, typer.Option("--json", help="Print news as JSON, one object a line.")] = False,
) -> None:
    """Train with others: join the run behind INVITE until it is finished or you press Ctrl-C."""
    from peer.home import Home
    from peer.joining import PeerOptions
    from peer.runtime import run_peer
    from peer.training.trainer import Limits
    from swarm.fitting import parse_bytes
    from swarm.keyfiles import data_home

    options = PeerOptions(
        invite=_parse(invite),
        home=Home((home or data_home()).absolute()),
        device=device,
        memory_bytes=parse_bytes(memory) if memory else None,
        limits=Limits(num_threads=threads, max_duty=duty / 100),
        disk_bytes=int(disk * 2**30),
        upload_limit_bps=int(upload * 1e6) if upload is not None else None,
        listen=(_maddr(listen),),
        announce=(_maddr(announce),) if announce else (),
        name=_display_name(name),
    )
    with _Voice(json_lines) as voice:
        _run(lambda stop: run_peer(options, stop, voice.hear))


def seed(
    invite: InviteText,
    data: Annotated[
        Path | None, typer.Option(help="Folder of prepared data to serve; else token shards are fetched from peers.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="Folder for the key and all data of this peer.")] = None,
    disk: Annotated[float, typer.Option(min=0.1, help="Disk limit, GiB.")] = 50,
    listen: Listen = "127.0.0.1:0",
    announce: Announce = "",
    parent: Annotated[int, typer.Option(hidden=True, help="End when this process has ended.")] = 0,
    json_lines: Annotated[bool, typer.Option("--json", help="Print news as JSON, one object a line.")] = False,
) -> None:
    """Keep a run alive: bootstrap, relay, archive and mirror. Trains nothing. `swarm start` runs one by itself.

    A further one is admitted once the organizer listed its peer id: swarm seeds RUN.toml --add PEER_ID.
    """
    from peer.home import Home
    from peer.joining import PeerOptions
    from peer.runtime import run_peer
    from swarm.keyfiles import data_home

    options = PeerOptions(
        invite=_parse(invite),
        home=Home((home or data_home() / "seed").absolute()),
        data_folder=data.absolute() if data is not None else None,
        mirrors=data is None,
        disk_bytes=int(disk * 2**30),
        listen=(_maddr(listen),),
        announce=(_maddr(announce),) if announce else (),
    )
    with _Voice(json_lines) as voice:
        _run(lambda stop: run_peer(options, stop, voice.hear), parent)


def start(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file that `swarm init` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the coordinator; 0: any free one.")] = 0,
    seed_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the seed peer; 0: any free one.")] = 0,
    public_host: Annotated[str, typer.Option(help="Name or address that volunteers dial, if not --host.")] = "",
    base: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Start from the checkpoint in this folder.")
    ] = None,
    token: Annotated[str, typer.Option(help="Admission token to put into the invite.")] = "",
    with_seed: Annotated[bool, typer.Option("--seed/--no-seed", help="Bring up a seed peer too.")] = True,
    json_lines: Annotated[bool, typer.Option("--json", help="Print news as JSON, one object a line.")] = False,
) -> None:
    """Start (or go on with) a run: sign its rules, print its invite, coordinate until Ctrl-C."""
    from swarm.cli.organizer import StartOptions, keep_seed_peer, prepare_run, start_coordinator, write_mirrors

    options = StartOptions(host=host, port=port, seed_port=seed_port, public_host=public_host or None, token=token)
    prepared = prepare_run(run_file, base)

    async def main(stop: asyncio.Event) -> None:
        server, invite = await start_coordinator(prepared, options)
        voice.say(
            "started", {"run": prepared.spec.name, "run id": prepared.spec.run_id.hex(), "invite": invite.encode()}
        )
        jobs: list[asyncio.Task[Any]] = [asyncio.create_task(stop.wait())]
        if with_seed:
            jobs.append(asyncio.create_task(keep_seed_peer(prepared, invite, options, voice.hear_line)))
        if prepared.mirrors.write:
            jobs.append(asyncio.create_task(write_mirrors(prepared, server, voice.say)))
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await server.stop()

    with _Voice(json_lines) as voice:
        _run(main)


def status(invite: InviteText, as_json: Json = False) -> None:
    """Show how far a run is: rounds, losses, and who contributed."""
    from peer.coordinator_client import CoordinatorClient

    async def ask() -> GetProgressReply:
        client = await CoordinatorClient.connect(_parse(invite))
        try:
            return await client.progress()
        finally:
            await client.close()

    reply = asyncio.run(ask())
    values = words.progress_values(reply)
    if as_json:
        from swarm.cli import output

        output.print_json(values)
        return
    done = 100 * reply.total_tokens / max(1, reply.target_tokens)
    tokens = f"{reply.total_tokens} of {reply.target_tokens} tokens ({done:.0f} %), {values['tokens/s']} tokens/s"
    print(f"{reply.name}: round {reply.round}, {tokens}")
    if values["waits for"]:
        print(f"training waits for {values['waits for']}")
    is_split = len(values["shards"]) > 1
    if is_split:
        columns = ["shard", "round", "tokens", "replicas", "tokens/s", "could tokens/s", "state"]
        _table("Shards", columns, values["shards"])
    _table(
        "Rounds", ["round", "tokens", "train loss", "validation loss", "contributors", "absent parts"], values["rounds"]
    )
    span = ["hosts", "tokens/s", "could tokens/s"] if is_split else ["tokens/s"]
    _table("Peers", ["peer", "round", "tokens", *span, "sent MB", "received MB", "state", "device"], values["peers"])
    if values["incidents"]:
        _table("Incidents", ["told (UTC)", "what"], values["incidents"])


def _table(title: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
    from swarm.cli import output

    cells = [["-" if row[column] is None else row[column] for column in columns] for row in rows[-MAX_ROWS:]]
    output.table(title, columns, cells)


class _Voice:
    """Says what happens: JSON lines for programs, a live view for people."""

    def __init__(self, json_lines: bool) -> None:
        from swarm.cli import output

        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        self._json_lines = json_lines
        self._view = None if json_lines else output.LiveView("swarm")

    def __enter__(self) -> _Voice:
        if self._view is not None:
            self._view.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._view is not None:
            self._view.__exit__(*error)

    def hear(self, news: News) -> None:
        """News of a peer in this process."""
        if news.kind == "joining":
            self.say("joining", words.plans(news.values))
        else:
            self.say(news.kind, news.values)

    def hear_line(self, news: dict[str, Any]) -> None:
        """News of a seed peer in a process of its own."""
        self.say(f"seed {news.pop('event', 'said')}", news)

    def say(self, kind: str, values: dict[str, Any]) -> None:
        if self._json_lines:
            clean = {key: None if value != value else value for key, value in values.items()}
            sys.stdout.write(json.dumps({"event": kind, **clean}) + "\n")
            sys.stdout.flush()
        elif self._view is not None and kind.endswith(("progress", "commit")):
            self._view.update({key: words.in_words(key, value) for key, value in values.items() if key in words.SHOWN})
        else:
            sys.stdout.write(
                f"{kind}\n" + "".join(f"  {key}: {words.in_words(key, value)}\n" for key, value in values.items())
            )
            sys.stdout.flush()


def _parse(invite: str) -> Invite:
    from swarm.invite import parse

    return parse(invite)


def _display_name(text: str) -> str:
    """A name that fits on a card. Raises `ConfigError`."""
    from swarm.errors import ConfigError
    from swarm.run_record import NAME_PATTERN

    if text and (re.fullmatch(NAME_PATTERN, text) is None or not text.isprintable()):
        raise ConfigError("--name: printable text of at most 64 characters, without markup", "choose a plain name")
    return text


def _maddr(address: str) -> str:
    """``HOST:PORT`` as a multiaddr."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not HOST:PORT", "write for example 0.0.0.0:7001")
    if host.replace(".", "").isdigit():
        return f"/ip4/{host}/tcp/{port}"
    return f"/ip6/{host.strip('[]')}/tcp/{port}" if ":" in host else f"/dns/{host}/tcp/{port}"


def _run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], parent: int = 0) -> None:
    """Run until done; the first Ctrl-C or SIGTERM asks for a clean end."""

    async def until_stopped() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        guard = asyncio.ensure_future(_stop_with(parent, stop)) if parent else None
        try:
            await main(stop)
        finally:
            if guard is not None:
                guard.cancel()

    asyncio.run(until_stopped())


async def _stop_with(parent: int, stop: asyncio.Event) -> None:
    """A child does not outlive its parent, however that ended."""
    while os.getppid() == parent:  # noqa: ASYNC110  no event tells this one
        await asyncio.sleep(PARENT_CHECK_S)
    stop.set()
