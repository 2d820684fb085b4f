"""The memory plan: what a replica of a span takes on its device and on its host, before anything is allocated.

Pure: figures of a model (`peer.training.measure` gets them) and a way of working in, bytes by component out. Decides
what counts and how much of it there is at once; that `peer.training.int8_replica`, `peer.training.fp32_replica` and
`peer.rounds.shard` take what is said here, within 10 %, is tested. Leaves choosing a span to `swarm.fitting`.

On the device some memory is held all the time, the rest only in a phase of an inner step; the peak is what is held plus
the largest phase. A phase counts what autograd keeps, not the scratch of single kernels.

On the host everything is counted as if it came together, at the end of a round. Encoded parts, what averages lost,
large messages, and the anchors that a checkpoint or an evaluation reads wait in files: pages of files are the system's
to take back, and are not counted. A reset of the replica in the middle of a round (training diverged) has a second
``start`` until the round ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from swarm.errors import SwarmError
from swarm.sharding import PieceValues, Span

Shape = tuple[int, ...]

FP32_BYTES = 4
BF16_BYTES = 2
# One fp32 scale for every block, of int8 weights as of 8-bit moments.
BLOCK_VALUES = 256
# bitsandbytes keeps the moments of smaller tensors in 32 bits.
MIN_8BIT_MOMENT_VALUES = 4096
# A larger int8 matrix is worked on in row tiles of so many values (peer.training.int8_matrix).
WHOLE_VALUES = 1 << 22
TILE_VALUES = 1 << 19
# Values that are updated at once, and the fp32 and index vectors that exist of each meanwhile.
UPDATE_VALUES = {"cpu": 1 << 17, "cuda": 1 << 20, "mps": 1 << 20}
UPDATE_BYTES = 20
# Logits that an 8-bit replica has at once (peer.training.int8_modules).
LOGIT_VALUES = {"cpu": 1 << 24, "cuda": 1 << 26, "mps": 1 << 26}

# A part of a shard: 128 slices, or what is left to each of about half of the 64 parts of a large one
# (peer.rounds.planning). A replica works on one at a time: fp32 twice, and its encoded bytes twice.
PART_VALUES = 1 << 21
PARTS_PER_REDUCER = 4
PARTS_OF_A_LARGE_SHARD = 31
WORK_BYTES_PER_VALUE = 10
# Parts that are being fetched at once (peer.rounds.exchange).
FETCHED_PARTS = 4
# What averages lost is on disk slice by slice (peer.rounds.reducer_debt): in memory is where, of the last round that
# was committed and of the next.
SLICE_VALUES = 1 << 14
# One table for all matrices (peer.training.dither).
DITHER_BYTES = 2 << 17
DEBT_BYTES_PER_SLICE = 2 * 560 + 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes that autograd keeps of one pass over ``batch`` sequences of ``sequence`` tokens, by part of the model."""

    batch: int
    sequence: int
    compute_bytes: int
    """per value, in linear layers: 4 (fp32) or 2 (bf16)"""
    embedding: int
    layers: tuple[int, ...]
    head: int
    """the final norm and the head's input; logits are not in it"""
    scratch: int
    """the most that lives besides, on the way back through a layer, without weights and their gradients"""

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNumbers:
    """A whole model in figures. Shapes of parameters: of each layer, of what is before them, of what is after."""

    vocab: int
    hidden: int
    layers: tuple[tuple[Shape, ...], ...]
    embedding: tuple[Shape, ...]
    head: tuple[Shape, ...]
    is_tied: bool
    """the head's matrix is the embedding's, listed there"""
    buffer_bytes: int
    activations: Activations

    def shapes(self, span: Span) -> tuple[Shape, ...]:
        """The parameters of ``span``. Raises `SwarmError` where it is not of this model."""
        if span.num_layers != len(self.layers) or (self.is_tied and not span.is_whole):
            raise SwarmError(f"{span} is no span of this model of {len(self.layers)} layers")
        inner = [shape for layer in self.layers[span.first : span.last] for shape in layer]
        return (*(self.embedding if span.has_embedding else ()), *inner, *(self.head if span.has_head else ()))

    def num_values(self, span: Span) -> int:
        return sum(map(math.prod, self.shapes(span)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """How a replica works: the form of its weights and moments, and what trades memory for time."""

    weights: Literal["int8", "fp32"] = "int8"
    moments: Literal["8bit", "32bit"] = "8bit"
    checkpointing: bool = False
    """keep only each layer's input, and compute the layer again on the way back"""
    microbatches: int = 1
    """per inner step; with more than one, gradients of matrices wait in bf16"""
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by component. ``phases``: what an inner step takes besides, phase by phase, one after another."""

    span: Span
    num_values: int
    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]

    @property
    def held_bytes(self) -> int:
        """On the device, all the time."""
        return sum(self.held.values())

    @property
    def device_bytes(self) -> int:
        """On the device, at the peak of an inner step."""
        return self.held_bytes + max(sum(phase.values()) for phase in self.phases.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def piece_values(numbers: ModelNumbers) -> PieceValues:
    """The figures that `swarm.sharding.split` cuts by."""
    return PieceValues(
        layer=max(sum(map(math.prod, layer)) for layer in numbers.layers),
        embedding=sum(map(math.prod, numbers.embedding)),
        head=sum(map(math.prod, numbers.head)),
    )


def plan(numbers: ModelNumbers, span: Span, working: Working) -> MemoryPlan:
    """What a replica of ``span`` takes that trains batches as ``numbers.activations`` says."""
    make = _int8_device if working.weights == "int8" else _fp32_device
    held, phases = make(numbers, span, working)
    held["buffers"] = numbers.buffer_bytes
    return MemoryPlan(
        span=span,
        num_values=numbers.num_values(span),
        held=held,
        phases=phases,
        host=_host(numbers.shapes(span), working),
    )


def activation_bytes(numbers: ModelNumbers, span: Span, *, checkpointing: bool) -> int:
    """What autograd keeps at the end of a forward pass; with checkpointing, and of the layer that is computed again."""
    kept = numbers.activations
    ends = kept.embedding * span.has_embedding + kept.head * span.has_head
    layers = kept.layers[span.first : span.last]
    if not checkpointing:
        return ends + sum(layers)
    inputs = len(layers) * kept.tokens * numbers.hidden * FP32_BYTES
    return ends + inputs + max(layers)


def _int8_device(
    numbers: ModelNumbers, span: Span, working: Working
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    matrices, vectors = _matrices_and_vectors(numbers.shapes(span))
    values, small, blocks = sum(matrices), sum(vectors), sum(map(_blocks, matrices))
    eight = working.moments == "8bit"
    held = {
        "int8 weights": values,
        "scales": FP32_BYTES * blocks,
        "moments": values * 2 if eight else values * 2 * FP32_BYTES,
        "scales of moments": 2 * FP32_BYTES * blocks if eight else 0,
        "small vectors": 3 * FP32_BYTES * small,  # with their moments
        "dither": DITHER_BYTES,
    }
    compute = numbers.activations.compute_bytes
    head = numbers.vocab * numbers.hidden
    all_wait = working.microbatches > 1
    waiting = BF16_BYTES * (values if all_wait else head if numbers.is_tied else 0)
    layer_matrices = [
        math.prod(shape) for layer in numbers.layers[span.first : span.last] for shape in layer if len(shape) > 1
    ]
    largest = max(layer_matrices, default=0)
    whole_fits = largest <= WHOLE_VALUES
    kept = activation_bytes(numbers, span, checkpointing=working.checkpointing)
    gradient = (compute if whole_fits else BF16_BYTES) * largest
    if all_wait:
        gradient = compute * min(largest, TILE_VALUES)
    dequantised = compute * (largest if whole_fits else 2 * TILE_VALUES)
    update = UPDATE_BYTES * min(largest, UPDATE_VALUES[working.device])
    phases = {
        "backward": {
            "activations": kept,
            # A matrix is updated when it has passed its gradient on, so the two are not there together.
            "scratch": max(update, dequantised + numbers.activations.scratch),
            "waiting gradients": waiting,
            "largest gradient": gradient,
            "gradients of small vectors": FP32_BYTES * small,
        }
    }
    if span.has_head:
        rows = min(numbers.activations.tokens, max(1, LOGIT_VALUES[working.device] // numbers.vocab))
        phases["loss"] = {
            "activations": kept,
            "waiting gradients": BF16_BYTES * (values if all_wait else head),
            "logits tile": FP32_BYTES * rows * numbers.vocab,
            "gradient of hidden states": 2 * FP32_BYTES * numbers.activations.tokens * numbers.hidden,
            "dequantised tile": 2 * FP32_BYTES * min(head, TILE_VALUES),
        }
    return held, phases


def _fp32_device(
    numbers: ModelNumbers, span: Span, working: Working
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    shapes = numbers.shapes(span)
    values = sum(map(math.prod, shapes))
    in_8_bits = [
        size for size in map(math.prod, shapes) if working.moments == "8bit" and size >= MIN_8BIT_MOMENT_VALUES
    ]
    held = {
        "weights": FP32_BYTES * values,
        "moments": 2 * sum(in_8_bits) + 2 * FP32_BYTES * (values - sum(in_8_bits)),
        "scales of moments": 2 * FP32_BYTES * sum(map(_blocks, in_8_bits)),
    }
    matrices, _ = _matrices_and_vectors(shapes)
    copies = BF16_BYTES * sum(matrices) if numbers.activations.compute_bytes == BF16_BYTES else 0
    kept = activation_bytes(numbers, span, checkpointing=working.checkpointing)
    logits = FP32_BYTES * numbers.activations.tokens * numbers.vocab if span.has_head else 0
    waiting = FP32_BYTES * values if working.microbatches > 1 else 0
    # What is on the way at the same time while the loss goes back: its softmax and the gradients of both.
    phases = {
        "loss": {"activations": kept, "logits": 3 * logits, "bf16 weights": copies, "waiting gradients": waiting},
        "backward": {
            "activations": kept,
            "scratch": numbers.activations.scratch,
            "bf16 weights": copies,
            "waiting gradients": waiting,
            "gradient of the head": FP32_BYTES * numbers.vocab * numbers.hidden * span.has_head,
        },
        "update": {"gradients": FP32_BYTES * values},
    }
    return held, phases


def _host(shapes: Iterable[Shape], working: Working) -> dict[str, int]:
    matrices, vectors = _matrices_and_vectors(shapes)
    values, small = sum(matrices) + sum(vectors), sum(vectors)
    if working.weights == "fp32":
        packed = FP32_BYTES * values
    else:
        packed = sum(matrices) + FP32_BYTES * (sum(map(_blocks, matrices)) + small)
    # A peer that averages alone has the largest parts.
    part = min(values, max(min(PART_VALUES, -(-values // PARTS_PER_REDUCER)), values // PARTS_OF_A_LARGE_SHARD))
    return {
        "anchor": FP32_BYTES * values,
        "momentum": _in_8_bits(values),
        "feedback": _in_8_bits(values),
        "start": packed,
        "snapshot": packed,
        # An fp32 replica moves its anchor along instead.
        "carried": packed if working.weights == "int8" else 0,
        # Of the slices that this peer averages: of all where it is alone.
        "debt of averages": DEBT_BYTES_PER_SLICE * -(-values // SLICE_VALUES),
        "a part at work": WORK_BYTES_PER_VALUE * part,
        "parts being fetched": min(FETCHED_PARTS * _in_8_bits(part), _in_8_bits(values)),
    }


def _in_8_bits(num_values: int) -> int:
    return num_values + FP32_BYTES * _blocks(num_values)


def _matrices_and_vectors(shapes: Iterable[Shape]) -> tuple[list[int], list[int]]:
    """Number of values of each parameter that an 8-bit replica quantises, and of each that it does not."""
    matrices: list[int] = []
    vectors: list[int] = []
    for shape in shapes:
        (matrices if len(shape) > 1 else vectors).append(math.prod(shape))
    return matrices, vectors


def _blocks(num_values: int) -> int:
    return -(-num_values // BLOCK_VALUES)
