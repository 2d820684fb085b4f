"""How fast a device multiplies matrices, tried out for a moment before anything has been trained on it.

Decides what is tried: matrices as wide as the model's, in the format in which replicas compute. Training reaches less,
as it does more than that; what it reached is measured later (`peer.training.between_steps`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from peer.training import device as devices

if TYPE_CHECKING:
    import torch

TRIED_S = 0.1
MAX_ROWS = 2048


def try_flops(device: torch.device, width: int, rows: int, num_threads: int | None = None) -> float:
    """Operations a second, of products [rows, width] x [width, width]; at most `MAX_ROWS` rows."""
    import torch

    usual_threads = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        dtype = torch.bfloat16 if devices.computes_in_bf16(device) else torch.float32
        left_RW = torch.ones(min(rows, MAX_ROWS), width, dtype=dtype, device=device)
        right_WW = torch.ones(width, width, dtype=dtype, device=device)
        _multiply(left_RW, right_WW, 1)  # the first one sets libraries up
        times, elapsed_s = 1, 0.0
        while elapsed_s < TRIED_S:
            times *= 2
            elapsed_s = _multiply(left_RW, right_WW, times)
        return 2.0 * left_RW.shape[0] * width * width * times / elapsed_s
    finally:
        torch.set_num_threads(usual_threads)


def _multiply(left_RW: torch.Tensor, right_WW: torch.Tensor, times: int) -> float:
    """How many seconds so many products take."""
    began_s = time.perf_counter()
    for _ in range(times):
        product_RW = left_RW @ right_WW
    product_RW[0, 0].item()  # a GPU is waited for
    return max(time.perf_counter() - began_s, 1e-9)
