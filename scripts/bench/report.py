"""The form of a benchmark's results: one JSON object on the last line, alike for all benchmarks.

Decides what is said beside the figures: whether the run was quick, its settings, the machine, the commit and the day.
Leaves figures and tables to the benchmark. A full run is kept by

    .venv/bin/python scripts/bench/NAME.py | tail -n 1 | python3 -m json.tool > docs/benchmarks/NAME.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def print_result(
    benchmark: str, figures: Mapping[str, Any], *, quick: bool, settings: Mapping[str, Any], device: Any = "cpu"
) -> None:
    """``figures`` come first, under the names that the goals use; ``device`` is torch's, where one did the work."""
    result = {
        "benchmark": benchmark,
        "quick": quick,
        **figures,
        "settings": dict(settings),
        "machine": machine(str(device)),
        "commit": commit_id(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    print(json.dumps(result, allow_nan=False), flush=True)


def commit_id() -> str:
    """Of the checkout, ``-dirty`` where files that git knows were changed since; ``unknown`` outside of a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge times and bytes by."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "device": gpu or "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    """The kernel's name for it, e.g. ``AMD EPYC``; the architecture where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
