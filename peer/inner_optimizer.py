"""The inner optimizer: AdamW over a replica's parameters, with 32-bit or 8-bit moments. The door to bitsandbytes.

Decides which implementation runs where and that weight decay is for matrices only (embeddings included; no biases, no
norms). Leaves learning rates to `swarm.schedule` and clipping to the replica. Moments are a peer's own affair: replicas
of one run may differ in them, so a device without 8-bit kernels (Apple MPS) keeps 32-bit moments instead.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch

from swarm.run_spec import Inner

EPSILON = 1e-8
DEVICES_WITHOUT_8BIT = ("mps",)


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
