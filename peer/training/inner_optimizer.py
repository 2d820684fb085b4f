"""The inner optimizer: AdamW with 32-bit or 8-bit moments. The door to bitsandbytes.

Decides which implementation runs where and that weight decay is for matrices only (embeddings included; no biases, no
norms). `build_optimizer` works on whole parameters, `Moments` on one matrix, a piece at a time. Leaves learning rates
to `swarm.schedule` and clipping to the replica. Moments are a peer's own affair: replicas of one run may differ in
them, so a device without 8-bit kernels (Apple MPS) keeps 32-bit moments instead.
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

from swarm.run_spec import Inner

EPSILON = 1e-8
DEVICES_WITHOUT_8BIT = ("mps",)
# bitsandbytes' block of an 8-bit moment; fixed in its kernels.
MOMENT_BLOCK = 256


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
        inner, span = update.inner, slice(first, first + len(weights))
        m, v = (state[span] for state in self._states)
        if self.in_8_bits:
            blocks = slice(first // MOMENT_BLOCK, -(-span.stop // MOMENT_BLOCK))
            largest_m, largest_v = (largest[blocks] for largest in self._largest)
            signed, unsigned = _code_maps(weights.device)
            _bitsandbytes().functional.optimizer_update_8bit_blockwise(
                *("adam", gradient, weights, m, v, inner.beta1, inner.beta2, 0.0, 0.0, EPSILON),
                *(update.step, update.learning_rate, signed, unsigned, largest_m, largest_v),
                weight_decay=inner.weight_decay,
                gnorm_scale=update.gradient_scale,
            )
            return
        gradient = gradient * update.gradient_scale
        m.lerp_(gradient, 1 - inner.beta1)
        v.mul_(inner.beta2).addcmul_(gradient, gradient, value=1 - inner.beta2)
        denominator = v.sqrt().div_(math.sqrt(1 - inner.beta2**update.step)).add_(EPSILON)
        weights.mul_(1 - update.learning_rate * inner.weight_decay)
        weights.addcdiv_(m, denominator, value=-update.learning_rate / (1 - inner.beta1**update.step))


@functools.cache
def _code_maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that the codes of the first (signed) and second (unsigned) moment stand for, [256] each."""
    functional = _bitsandbytes().functional
    return tuple(functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False))


@functools.cache
def _bitsandbytes() -> Any:
    """bitsandbytes, without the code that it would download.

    Where the package ``kernels`` is installed, importing bitsandbytes fetches compiled code from a hub and runs it. A
    peer runs only installed code, so that package is hidden while the import lasts, and the warning about it too.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hidden = {name: sys.modules.pop(name) for name in ("kernels",) if name in sys.modules}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        import bitsandbytes
    finally:
        del sys.modules["kernels"]
        sys.modules.update(hidden)
    return bitsandbytes
