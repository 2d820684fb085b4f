"""The rival in the pipeline benchmark: hivemind's remote experts, with a client in the middle of every hop.

Each server holds a span as one expert in fp32 with AdamW; hidden states and gradients travel in blocks of 8 bits, the
fewest that hivemind has, as exact as ours. The client reads the data, sends every span's input (the first one's are
tokens alone) and takes its output, there and again on the way back (servers keep nothing between the two, and compute
forward twice), several microbatches at once. That is hivemind's way; nothing of it is changed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import hivemind
import psutil
import torch
from averaging_place import Place as Seat
from averaging_place import serve, settle_in, usage
from hivemind.moe import ModuleBackend, Server, get_experts
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from pipeline_task import Task, hold_to, optimizer_of

from peer.training import model
from peer.training.span import forward, initial_values, materialise

HANDLERS = 2


def rival(pipe: Connection, seat: Seat, task: Task) -> None:
    """The last peer is the client."""
    settle_in(seat)
    hold_to(task.cpu_share, f"rival-{seat.index}")
    side = _Side(seat, task)
    try:
        serve(pipe, seat, {name: getattr(side, name) for name in ("begin", "prepare", "measure", "end")})
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(0)


class _SpanLoss(torch.nn.Module):
    """A span as an expert: of the last one the loss of each sequence, of the others hidden states."""

    def __init__(self, task: Task, index: int, count: int) -> None:
        super().__init__()
        self.span = task.shards(count)[index]
        self.model = model.build_span(task.config(), self.span)
        materialise(self.model, initial_values(self.model, 0))

    def forward(self, tokens: torch.Tensor, value: torch.Tensor | None = None) -> torch.Tensor:
        result = forward(self.model, self.span, tokens[:, :-1] if value is None else value)
        if not self.span.has_head:
            return result
        losses = torch.nn.functional.cross_entropy(result.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1).mean(1)


class _Side:
    def __init__(self, seat: Seat, task: Task) -> None:
        self._seat, self._task = seat, task
        self._num_servers = seat.peers - 1
        self._dht: Any = None
        self._server: Any = None
        self._microbatches = 0
        self._ended = threading.Event()

    def begin(self, meet: str) -> dict[str, Any]:
        host = [f"/ip4/{self._seat.address}/tcp/0"]
        self._dht = hivemind.DHT(
            host_maddrs=host,
            initial_peers=[meet] if meet else [],
            start=True,
            use_ipfs=False,
            ensure_bootstrap_success=True,
        )
        return {"meet": str(self._dht.get_visible_maddrs()[0])}

    def prepare(self, meets: list[str]) -> dict[str, Any]:
        if self._seat.index < self._num_servers:
            self._serve()
        else:
            self._train()
        return {}

    def measure(self, seconds: float) -> dict[str, Any]:
        began_s, before, sent = time.monotonic(), self._microbatches, usage(self._seat)["sent_bytes"]
        time.sleep(seconds)
        tokens = (self._microbatches - before) * self._task.tokens_per_microbatch
        sent_bytes = usage(self._seat)["sent_bytes"] - sent
        return {"seconds": time.monotonic() - began_s, "tokens": tokens, "computed_s": 0.0, "sent_bytes": sent_bytes}

    def end(self) -> dict[str, Any]:
        self._ended.set()
        return {}

    def _serve(self) -> None:
        task = self._task
        module = _SpanLoss(task, self._seat.index, self._num_servers)
        in_8_bits = CompressionType.BLOCKWISE_8BIT
        hidden = BatchTensorDescriptor(
            task.length, task.hidden, dtype=torch.float32, requires_grad=True, compression=in_8_bits
        )
        tokens = BatchTensorDescriptor(task.length + 1, dtype=torch.int64)
        is_last = module.span.has_head
        outputs = BatchTensorDescriptor(dtype=torch.float32, requires_grad=True) if is_last else hidden
        backend = ModuleBackend(
            name=f"span.{self._seat.index}",
            module=module,
            optimizer=optimizer_of(module, task),
            args_schema=(tokens,) if module.span.has_embedding else (tokens, hidden),
            outputs_schema=outputs,
            max_batch_size=task.sequences,
        )
        self._server = Server(self._dht, {backend.name: backend}, num_connection_handlers=HANDLERS, device="cpu")
        self._server.run_in_background(await_ready=True)

    def _train(self) -> None:
        names = [f"span.{index}" for index in range(self._num_servers)]
        deadline = time.monotonic() + self._task.timeout_s
        experts = get_experts(self._dht, names)
        while not all(experts):
            if time.monotonic() > deadline:
                raise TimeoutError("no experts were found")
            time.sleep(0.5)
            experts = get_experts(self._dht, names)
        for _ in range(self._task.max_in_flight):
            threading.Thread(target=self._keep_training, args=(experts,), daemon=True).start()
        # Its processes import libraries with the first microbatch: that is not what is measured.
        while self._microbatches < self._task.max_in_flight:
            if time.monotonic() > deadline:
                raise TimeoutError("no microbatch came back")
            time.sleep(0.1)

    def _keep_training(self, experts: Any) -> None:
        task = self._task
        while not self._ended.is_set():
            tokens = torch.from_numpy(task.batch(self._microbatches))
            value = experts[0](tokens)
            for expert in experts[1:]:
                value = expert(tokens, value)
            value.mean().backward()
            self._microbatches += 1
