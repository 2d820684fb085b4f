"""The inner optimizer: AdamW with 32-bit or 8-bit moments. The door to bitsandbytes.

Decides which implementation runs where and that weight decay is for matrices only (embeddings included; no biases, no
norms). `build_optimizer` works on whole parameters, `Moments` on one matrix, a piece at a time. Leaves learning rates
to `swarm.schedule` and clipping to the replica. Moments are a peer's own affair: replicas of one run may differ in
them, so a device without 8-bit kernels (Apple MPS) keeps 32-bit moments instead.

On the CPU the arithmetic is torch's and 8-bit moments are encoded here, by a look-up; bitsandbytes gives the meaning of
codes and decodes them. Its own encoder there takes longer than all else in an update, and gives small numbers codes up
to seven from the nearest.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from peer.training import quantized
from swarm.run_spec import Inner

EPSILON = 1e-8
DEVICES_WITHOUT_8BIT = ("mps",)
# bitsandbytes' block of an 8-bit moment; fixed in its kernels.
MOMENT_BLOCK = 256
# A moment is rounded to fp16 before its code is looked up, by at most 2**-11 of it; codes are 0.014 apart, or more. Its
# block's largest value becomes this, so that the smallest code (3e-7) is far above what fp16 rounds more coarsely.
LARGEST_HALF = 2.0**15
SMALLEST_BLOCK = torch.finfo(torch.float32).tiny * LARGEST_HALF


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], inner: Inner, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with fresh moments; the caller sets ``lr`` in every parameter group before each step."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, inner.weight_decay), (vectors, 0.0))
        if members
    ]
    settings = {"lr": inner.learning_rate, "betas": (inner.beta1, inner.beta2), "eps": EPSILON}
    if inner.optimizer == "adamw8bit" and device.type not in DEVICES_WITHOUT_8BIT:
        # Tensors under 4096 values (norms, biases) keep 32-bit moments: bitsandbytes' own rule.
        optimizer: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(groups, **settings)
        return optimizer
    # One kernel for all tensors: several times faster than one operation per tensor and moment.
    return torch.optim.AdamW(groups, fused=True, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update of a matrix is told: ``step`` counts from 1; ``gradient_scale`` clips."""

    inner: Inner
    learning_rate: float
    step: int
    gradient_scale: float


class Moments:
    """AdamW's two moments of one matrix of ``num_values`` values: 8 bits each in blocks of 256, or 32."""

    def __init__(self, num_values: int, inner: Inner, device: torch.device) -> None:
        self.in_8_bits = inner.optimizer == "adamw8bit" and device.type not in DEVICES_WITHOUT_8BIT
        self.step = 0
        kind = torch.uint8 if self.in_8_bits else torch.float32
        self._states = [torch.zeros(num_values, dtype=kind, device=device) for _ in range(2)]
        blocks = -(-num_values // MOMENT_BLOCK) if self.in_8_bits else 0
        # Zero times any code is zero, so fresh moments need no particular codes.
        self._largest = [torch.zeros(blocks, device=device) for _ in range(2)]

    def tensors(self) -> list[torch.Tensor]:
        """All that is kept between steps."""
        return [*self._states, *self._largest]

    def forget(self) -> None:
        self.step = 0
        for tensor in self.tensors():
            tensor.zero_()

    def update_(self, weights: torch.Tensor, gradient: torch.Tensor, first: int, update: Update) -> None:
        """Move ``weights`` (fp32 [n], contiguous) in place by ``gradient`` (fp32 [n]); they begin at value ``first``.

        ``first`` is a multiple of 256.
        """
        span = slice(first, first + len(weights))
        m, v = (state[span] for state in self._states)
        if not self.in_8_bits:
            _adamw_(weights, gradient, m, v, update)
            return
        blocks = slice(first // MOMENT_BLOCK, -(-span.stop // MOMENT_BLOCK))
        largest_m, largest_v = (largest[blocks] for largest in self._largest)
        signed, unsigned = code_maps(weights.device)
        functional, inner = _bitsandbytes().functional, update.inner
        if weights.device.type != "cpu":
            functional.optimizer_update_8bit_blockwise(
                *("adam", gradient, weights, m, v, inner.beta1, inner.beta2, 0.0, 0.0, EPSILON),
                *(update.step, update.learning_rate, signed, unsigned, largest_m, largest_v),
                weight_decay=inner.weight_decay,
                gnorm_scale=update.gradient_scale,
            )
            return
        decode = functools.partial(functional.dequantize_blockwise, blocksize=MOMENT_BLOCK)
        m_now, v_now = decode(m, absmax=largest_m, code=signed), decode(v, absmax=largest_v, code=unsigned)
        _adamw_(weights, gradient, m_now, v_now, update)
        _encode(m_now, m, largest_m, _codes_of_halves(signed=True))
        _encode(v_now, v, largest_v, _codes_of_halves(signed=False))


def _adamw_(weights: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, update: Update) -> None:
    """The plain rule in fp32, all in place but for ``gradient``."""
    inner = update.inner
    gradient = gradient * update.gradient_scale
    m.lerp_(gradient, 1 - inner.beta1)
    v.mul_(inner.beta2).addcmul_(gradient, gradient, value=1 - inner.beta2)
    # Both corrections for the zeros that moments begin with are numbers of the whole step: one factor, and epsilon's.
    correction = math.sqrt(1 - inner.beta2**update.step)
    denominator = torch.sqrt(v, out=gradient).add_(EPSILON * correction)
    weights.mul_(1 - update.learning_rate * inner.weight_decay)
    weights.addcdiv_(m, denominator, value=-update.learning_rate * correction / (1 - inner.beta1**update.step))


def _encode(values: torch.Tensor, codes: torch.Tensor, largest: torch.Tensor, codes_of_halves: torch.Tensor) -> None:
    """Write ``values`` (fp32 [n], destroyed) as ``codes`` (uint8 [n]) and ``largest`` (fp32 [blocks])."""
    largest.copy_(quantized.largest_of_blocks(values))
    # A block so small that its factor would not be finite becomes zeros.
    factors = (LARGEST_HALF / largest).masked_fill_(largest < SMALLEST_BLOCK, 0.0)
    quantized.scale_blocks_(values, factors)
    places = values.to(torch.float16).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    torch.index_select(codes_of_halves, 0, places, out=codes)


@functools.cache
def _codes_of_halves(*, signed: bool) -> torch.Tensor:
    """The nearest code of x for each of the 2**16 numbers ``LARGEST_HALF * x`` in fp16, by its bits."""
    values = code_maps(torch.device("cpu"))[0 if signed else 1]
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    between = (values[1:] + values[:-1]) / 2
    return torch.bucketize(halves.float() / LARGEST_HALF, between).to(torch.uint8)


@functools.cache
def code_maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that the codes of the first (signed) and second (unsigned) moment stand for, [256] each."""
    functional = _bitsandbytes().functional
    return tuple(functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False))


@functools.cache
def _bitsandbytes() -> Any:
    """bitsandbytes, without the code that it would download, and without a compiler.

    Where the package ``kernels`` is installed, importing bitsandbytes fetches compiled code from a hub and runs it. A
    peer runs only installed code, so that package is hidden while the import lasts, and the warning about it too. So is
    ``torch.compile``: its decorators load a compiler for a second, for functions that nobody here calls.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hidden = {name: sys.modules.pop(name) for name in ("kernels",) if name in sys.modules}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    compiles = torch.compile
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        import bitsandbytes
    finally:
        torch.compile = compiles
        del sys.modules["kernels"]
        sys.modules.update(hidden)
    return bitsandbytes
