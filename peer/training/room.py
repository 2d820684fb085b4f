"""Room: how much memory a replica may take on this machine.

Decides what counts as free: on the host what the system calls available, less where a control group (a container, a
batch system) allows less; on CUDA what the driver calls free; never more than the volunteer's limit. Leaves what needs
how much to `swarm.memory_plan`, and what fits to `swarm.fitting`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from peer.training.device import free_bytes
from swarm.fitting import Room

if TYPE_CHECKING:
    import torch

MAX_FILE_BYTES = 1 << 16
# (folder of the hierarchy, limit, use, what of it the kernel would give back) of the second and the first version
_GROUPS = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def measure_room(device: torch.device, limit_bytes: int | None = None) -> Room:
    """What is free now. ``limit_bytes``: of the device's memory; on CPU and MPS, where it is the host's, of all."""
    host, free = host_bytes(), free_bytes(device)
    on_device = host if free is None else free
    if limit_bytes is not None:
        on_device = min(on_device, limit_bytes)
    return Room(device_bytes=on_device, host_bytes=on_device if free is None else host)


def host_bytes(root: Path = Path("/")) -> int:
    """Memory of the host that a program may still take."""
    return min([_available(root / "proc/meminfo"), *_left_in_groups(root)])


def _available(meminfo: Path) -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(meminfo), re.MULTILINE)
    # Other systems do not say in a file: there everything counts.
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups(root: Path) -> list[int]:
    """What each control group that this process is in, and each above it, has left."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        folder, limit, use, reclaimable = _GROUPS[version]
        top = root / "sys/fs/cgroup" / folder
        # In a container the path may be one outside of it: what is not here is passed over.
        place = top / path.strip("/")
        for group in [place, *place.parents]:
            allowed = _text(group / limit).strip()
            if allowed.isdigit():
                cached = re.search(rf"^{reclaimable} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                used = int(_text(group / use).strip() or 0) - (int(cached[1]) if cached else 0)
                left.append(max(0, int(allowed) - used))
            if group == top:
                break
    return left


def _text(path: Path) -> str:
    """The beginning of a small file of the kernel; nothing where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError:
        return ""
