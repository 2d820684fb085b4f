"""The processes of the download benchmark, each in a namespace of its own: sources, and those who download.

    download_side.py web FOLDER ADDRESS               files by range, and as huggingface_hub asks for them
    download_side.py peer FOLDER ADDRESS NUMBER       a peer that serves the checkpoint
    download_side.py get FOLDER TARGET PLAN           our download; PLAN: {"peers": [[multiaddr, number]], ...}
    download_side.py hub ENDPOINT FOLDER FILE         huggingface_hub's

Each says one JSON object a line.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

PORT = 7070
REPOSITORY = "bench/sample"


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


async def web(folder: Path, address: str) -> None:
    """A web server; under huggingface_hub's paths it says what that library wants to know of a file."""
    from aiohttp import web as server

    async def file(request: server.Request) -> server.StreamResponse:
        name = request.path.rpartition("/")[2]
        path = folder / name
        if not path.is_file():
            raise server.HTTPNotFound
        headers = {}
        if "/resolve/" in request.path:
            etag = hashlib.sha256(f"{name} {path.stat().st_size}".encode()).hexdigest()
            headers = {"X-Repo-Commit": "c" * 40, "X-Linked-Etag": f'"{etag}"', "ETag": f'"{etag}"'}
            if request.method == "HEAD":
                return server.Response(headers={**headers, "Content-Length": str(path.stat().st_size)})
        return server.FileResponse(path, headers=headers)

    app = server.Application()
    app.router.add_route("*", "/{path:.*}", file)
    runner = server.AppRunner(app, access_log=None)
    await runner.setup()
    await server.TCPSite(runner, address, PORT).start()
    say(ready=f"http://{address}:{PORT}")
    await asyncio.Event().wait()


def _identity(number: int) -> Any:
    from swarm.identity import Identity

    return Identity(hashlib.sha256(b"download benchmark %d" % number).digest())


async def _network(run_id: bytes, number: int, **more: Any) -> Any:
    from peer.p2p.network import NetworkConfig, open_network

    return await open_network(
        NetworkConfig(run_id=run_id, clock=time.time, directory_keys=("status-0",), **more), _identity(number)
    )


async def peer(folder: Path, address: str, number: int) -> None:
    """A peer that holds the checkpoint."""
    from peer.checkpoints.verify import read_provenance
    from peer.p2p.chunk_store import CHUNK_METHOD, ChunkStore
    from swarm.checkpoint_chunks import FileChunks

    found = read_provenance(folder, None)
    store = ChunkStore(folder.parent / f"chunks-{number}", 1 << 20)
    store.add_source(FileChunks(folder, found.manifest))
    network = await _network(found.run_id, number, host_maddrs=(f"/ip4/{address}/tcp/0",))
    await network.serve(CHUNK_METHOD, store.handle_chunk)
    say(ready=network.addresses[0])
    await asyncio.Event().wait()


async def get(folder: Path, target: Path, plan: dict[str, Any]) -> None:
    """Fetch the checkpoint whose signed manifest lies in ``folder``: seconds until all is in place, and in all."""
    from peer.checkpoints.download import Order, download
    from peer.checkpoints.filling import Fetching
    from peer.checkpoints.mirrors import open_mirrors
    from peer.checkpoints.sources import PeerSource, Source, Tally
    from peer.checkpoints.verify import read_provenance

    found = read_provenance(folder, None)
    order = Order(run_id=found.run_id, signed_spec=found.signed_spec, publication=found.publication, target=target)
    in_place: list[float] = []
    tally = Tally(on_progress=lambda done, total: in_place.append(time.monotonic()))
    async with AsyncExitStack() as stack:
        sources: list[Source] = []
        if plan["peers"]:
            network = await _network(
                found.run_id, 100 + os.getpid(), initial_peers=(plan["peers"][0][0],), dht_server=False
            )
            stack.push_async_callback(network.close)
            for address, number in plan["peers"]:
                key = _identity(number).public_key
                await network.connect(key, (address,), timeout_s=10.0)
                sources.append(PeerSource(network, key))
        sources += await stack.enter_async_context(open_mirrors(plan["mirrors"], (), found.manifest.round))
        say(begun=True)
        began, processor_s = time.monotonic(), time.process_time()
        await download(order, Fetching(sources=sources, tally=tally))
        ended, processor_s = time.monotonic(), time.process_time() - processor_s
        in_place_s = in_place[-1] - began
        say(seconds=ended - began, in_place_seconds=in_place_s, processor_s=processor_s, **tally.as_json())


def hub(endpoint: str, folder: Path, file: str) -> None:
    """The same file by huggingface_hub, which is told its settings by the environment before it is imported."""
    os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(folder)}
    from huggingface_hub import __version__, hf_hub_download

    say(begun=True)
    began = time.monotonic()
    path = hf_hub_download(REPOSITORY, file, cache_dir=folder)
    say(seconds=time.monotonic() - began, path=path, version=__version__)


def main() -> None:
    role, *words = sys.argv[1:]
    if role == "web":
        asyncio.run(web(Path(words[0]), words[1]))
    elif role == "peer":
        asyncio.run(peer(Path(words[0]), words[1], int(words[2])))
    elif role == "get":
        asyncio.run(get(Path(words[0]), Path(words[1]), json.loads(words[2])))
    else:
        hub(words[0], Path(words[1]), words[2])


if __name__ == "__main__":
    main()
