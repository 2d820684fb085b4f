"""Hosting: which span of the run this machine takes on, and the replica that is built of it.

Decides by the memory plan, before anything is fetched or allocated, from what is free here and what the volunteer
allows; and that fp32 weights of an 8-bit replica never exist. Leaves what a span takes to `swarm.memory_plan`, the
choice among spans to `swarm.fitting`, weights to whoever loads an anchor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peer.training import device as devices
from peer.training import model
from peer.training.room import measure_room
from swarm import fitting, sharding
from swarm.digest import sha256
from swarm.families import family_of
from swarm.fitting import RUNTIME_BYTES, Choice
from swarm.memory_plan import ModelNumbers, piece_values
from swarm.pipeline_plan import flops_per_token
from swarm.placement import Hosted
from swarm.run_spec import RunSpec
from swarm.sharding import Span

if TYPE_CHECKING:
    import torch

    from peer.pipeline.trainer import HostedReplica


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosting:
    """``config``: the whole model's; ``shards``: of the run; ``work``: operations of a token in each of them."""

    device: torch.device
    config: Any
    shards: tuple[Span, ...]
    work: tuple[float, ...]
    fits: tuple[Choice, ...]
    """every span that fits here, the largest first"""
    choice: Choice
    in_flight: tuple[int, ...]
    """of each of ``fits``: microbatches whose activations fit beside the replica"""
    tried_flops: float = 0.0
    """operations a second that the device did when it was tried; 0: it was not, as the run has one shard"""

    def hosted(self, choice: Choice) -> Hosted:
        """The shards of a choice."""
        span = choice.plan.span
        inside = [i for i, shard in enumerate(self.shards) if span.first <= shard.first and shard.last <= span.last]
        return Hosted(first=inside[0], last=inside[-1] + 1)

    @property
    def span(self) -> Hosted:
        """The shards that are hosted here."""
        return self.hosted(self.choice)

    @property
    def max_in_flight(self) -> int:
        return self.in_flight[self.fits.index(self.choice)]


def choose_hosting(spec: RunSpec, vocab_size: int, device_name: str, memory_bytes: int | None = None) -> Hosting:
    """What this machine can take on, the largest span first. ``memory_bytes``: the most of the device's memory.

    Raises `DeviceError` where there is no such device, and `ResourceError` where nothing fits.
    """
    device = devices.choose(device_name)
    config = model.build_config(spec, vocab_size)
    in_bf16 = devices.computes_in_bf16(device)

    @functools.cache
    def numbers_of(batch: int) -> ModelNumbers:
        return model.measure(config, batch=batch, sequence=spec.data.sequence_length, in_bf16=in_bf16)

    batch = spec.inner.microbatch_sequences
    shards = sharding.split(config.num_hidden_layers, spec.num_shards, piece_values(numbers_of(batch)))
    room, working = measure_room(device, memory_bytes), fitting.working(spec.inner, device.type)
    if spec.num_shards > 1:  # gradients of several microbatches are gathered
        working = replace(working, microbatches=spec.pipeline.step_microbatches)
    found = fitting.choices(numbers_of, shards, working, batch, room)
    if memory_bytes is not None:
        devices.limit_memory(device, memory_bytes - RUNTIME_BYTES[device.type])
    return Hosting(
        device=device,
        config=config,
        shards=shards,
        work=tuple(float(flops_per_token(numbers_of(batch), shard, working)) for shard in shards),
        fits=found,
        choice=found[0],
        in_flight=tuple(fitting.in_flight(choice, numbers_of(choice.batch), room) for choice in found),
    )


def build_replica(hosting: Hosting, spec: RunSpec, peer_key: bytes) -> HostedReplica:
    """The replica that was chosen, without weights: load an anchor."""
    from peer.training.fp32_replica import Replica
    from peer.training.int8_replica import Int8Replica
    from peer.training.span import from_layer

    built = model.build_span(hosting.config, hosting.choice.plan.span, hosting.device)
    layout, at_once = model.layout_of(built), hosting.choice.batch
    # Replicas round differently, so that what one loses by chance another keeps.
    seed = int.from_bytes(sha256(f"swarm.v1 rounding {spec.seed}".encode() + peer_key)[:8], "little") >> 1
    replica = (
        Replica(built, layout, spec.inner, hosting.device, at_once)
        if spec.inner.weights == "fp32"
        else Int8Replica(built, layout, spec.inner, hosting.device, seed, at_once)
    )
    for shard in hosting.span.shards[1:]:
        later = from_layer(built, family_of(spec.model.family), hosting.shards[shard].first)
        replica.passes.open_entrance(shard, later)
    return replica
