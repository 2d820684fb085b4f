"""The rivals in the race to a loss: hivemind.Optimizer, and torch's DistributedDataParallel over gloo.

Both train synchronously, so their arithmetic is that of one process: how many steps they need is counted there, on the
mean gradient of what all peers accumulate. How long a step takes is measured on the links, compute included, in the
median of real steps of real peers. Decides their settings: hivemind with fp16 for gradients and state, its shortest
documented search for a group (3 s), otherwise as its guide says; gloo with torch's own buckets.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hivemind
import numpy as np
import psutil
import torch
import torch.distributed
import torch.nn.functional as F
from averaging_place import Place, serve, settle_in
from hivemind.compression import Float16Compression
from loss_task import Task, Text
from torch.nn.parallel import DistributedDataParallel

from peer.training.fp32_replica import Replica
from peer.training.model import build_config, build_model, layout_of
from swarm import schedule
from swarm.run_spec import RunSpec

GLOO_PORT = 29_555
MATCHMAKING_S, AVERAGING_TIMEOUT_S = 3.0, 60.0
JUDGED_EVERY_TOKENS = 16_384
CPU = torch.device("cpu")


def steps_to_loss(task: Task, spec: RunSpec, text: Text, accumulation: int, total_tokens: int) -> int | None:
    """Synchronous steps, of ``accumulation`` inner steps of every peer, to the target loss; None where they end above.

    The learning rate falls over ``total_tokens``.
    """
    model = build_model(build_config(spec, task.vocab_size), 0)
    replica = Replica(model, layout_of(model), spec.inner, CPU, microbatch_sequences=4 * task.sequences)
    random = np.random.default_rng(accumulation)
    tokens_per_step = accumulation * task.tokens_per_step
    judged_every = max(1, JUDGED_EVERY_TOKENS // tokens_per_step)
    for step in range(total_tokens // tokens_per_step):
        rate = schedule.learning_rate(spec.inner, step * tokens_per_step, total_tokens)
        replica.step(text.batch(random, task.peers * accumulation * task.sequences), rate)
        if (step + 1) % judged_every == 0 and replica.evaluate(replica.read(), text.validation) <= task.target_loss:
            return step + 1
    return None


def hivemind_optimizer(pipe: Connection, place: Place, task: Task, data: Path) -> None:
    settle_in(place)
    held: dict[str, Any] = {}

    def begin(meet: str) -> dict[str, Any]:
        address = [f"/ip4/{place.address}/tcp/0"]
        held["dht"] = hivemind.DHT(host_maddrs=address, initial_peers=[meet] if meet else [], start=True)
        return {"meet": str(held["dht"].get_visible_maddrs()[0])}

    def steps(accumulation: int) -> dict[str, Any]:
        model, train = _model(task, data, place)
        optimizer = hivemind.Optimizer(
            dht=held["dht"],
            run_id=f"race-{accumulation}",
            params=model.parameters(),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=task.learning_rate),
            batch_size_per_step=task.sequences,
            target_batch_size=task.peers * accumulation * task.sequences,
            matchmaking_time=MATCHMAKING_S,
            averaging_timeout=AVERAGING_TIMEOUT_S,
            grad_compression=Float16Compression(),
            state_averaging_compression=Float16Compression(),
        )
        ended: list[float] = []
        # All stop at about one time: whoever left first would keep the others searching for a group.
        deadline = time.monotonic() + task.hivemind_s
        while time.monotonic() < deadline:
            epoch = optimizer.local_epoch
            train(model)
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.local_epoch != epoch:
                ended.append(time.monotonic())
        optimizer.shutdown()
        return {"seconds": np.diff(ended).tolist()}

    try:
        serve(pipe, place, {"begin": begin, "steps": steps})
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(0)


def ddp(pipe: Connection, place: Place, task: Task, data: Path) -> None:
    settle_in(place)
    os.environ["GLOO_SOCKET_IFNAME"] = place.device

    def begin(meet: str) -> dict[str, Any]:
        os.environ.update(MASTER_ADDR=meet, MASTER_PORT=str(GLOO_PORT))
        patience = timedelta(seconds=place.timeout_s)
        torch.distributed.init_process_group("gloo", rank=place.index, world_size=place.peers, timeout=patience)
        return {}

    def steps(accumulation: int) -> dict[str, Any]:
        bare, train = _model(task, data, place)
        model = DistributedDataParallel(bare)
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
        ended = []
        for _ in range(task.timed_steps + 1):
            with model.no_sync():
                for _ in range(accumulation - 1):
                    train(model)
            train(model)
            optimizer.step()
            optimizer.zero_grad()
            ended.append(time.monotonic())
        return {"seconds": np.diff(ended).tolist()}

    serve(pipe, place, {"begin": begin, "steps": steps})
    os._exit(0)  # gloo's threads would wait for the other peers


RIVALS = {"hivemind": hivemind_optimizer, "ddp": ddp}


def seconds_per_step(answers: list[dict[str, Any]]) -> float | None:
    """The median over steps of the slowest peer; None where fewer than two steps were made."""
    if any(len(answer["seconds"]) < 2 for answer in answers):
        return None
    return max(statistics.median(answer["seconds"]) for answer in answers)


def _model(task: Task, data: Path, place: Place) -> tuple[torch.nn.Module, Callable[[torch.nn.Module], None]]:
    """The model, and one inner step without its update."""
    model = build_model(build_config(task.spec(data), task.vocab_size), 0)
    text = Text(data, place.folder / "cache", task.length)
    batches = _batches(task, text, place.index)

    def train(module: torch.nn.Module) -> None:
        tokens = next(batches)
        logits = module(input_ids=tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    return model, train


def _batches(task: Task, text: Text, peer: int) -> Iterator[torch.Tensor]:
    random = np.random.default_rng(peer)
    while True:
        yield torch.from_numpy(text.batch(random, task.sequences))
