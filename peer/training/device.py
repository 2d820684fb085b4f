"""The compute device: which one a peer trains on, what it can, and how to say it to a person.

Decides what ``auto`` means (CUDA, then Apple MPS, then the CPU) and that a device which was asked for by name is never
replaced by another. Leaves how much memory may be used to `peer.training.room`, limits on time to the trainer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from swarm.errors import DeviceError

if TYPE_CHECKING:
    import torch

GIBIBYTE = 1 << 30
MAX_DESCRIPTION = 64


def choose(name: str = "auto") -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. Raises `DeviceError` if there is none."""
    import torch

    match = re.fullmatch(r"auto|cpu|mps|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise DeviceError(f"{name!r} is no compute device", "use auto, cpu, cuda, cuda:0 or mps")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda:0" if num_gpus else "mps" if has_mps else "cpu")
    if name.startswith("cuda"):
        index = int(match.group(1) or 0)
        if index >= num_gpus:
            found = f"{num_gpus} found" if num_gpus else "none found"
            raise DeviceError(f"no CUDA device {name!r} ({found})", "use --device auto, or check the NVIDIA driver")
        return torch.device("cuda", index)
    if name == "mps" and not has_mps:
        raise DeviceError("no Apple MPS device", "use --device auto")
    return torch.device(name)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether replicas compute in bf16 there; elsewhere in fp32."""
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def free_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device that this process may still take or already holds; None where it shares the host's.

    Asking makes the driver set itself up, so what it takes for itself (`swarm.fitting.RUNTIME_BYTES`) is already gone
    from this figure: a plan that adds it is too careful by that much, never too bold.
    """
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device)


def limit_memory(device: torch.device, limit_bytes: int) -> None:
    """Let torch take no more of a CUDA device than ``limit_bytes``: beyond, it says that memory ran out."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)


def describe(device: torch.device, num_threads: int | None = None) -> str:
    """A short text for people, at most 64 characters: ``CPU, 2 threads``, ``NVIDIA H200, 139 GiB``."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        text = f"{properties.name}, {properties.total_memory // GIBIBYTE} GiB"
    elif device.type == "mps":
        text = "Apple MPS"
    else:
        threads = num_threads or torch.get_num_threads()
        text = f"CPU, {threads} thread" + ("" if threads == 1 else "s")
    return text[:MAX_DESCRIPTION]
