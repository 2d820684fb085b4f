"""What all sides of the pipeline benchmark train, and under which quota: model, text, microbatches, CPU.

Decides them once for all sides. A quota holds a peer's process and all that it starts (p2pd, hivemind's handlers).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quality_setting import SMALL, VOCAB, Setting, read_text, spec_of

from peer.training import model
from peer.training.inner_optimizer import build_optimizer
from swarm.sharding import Span, from_sizes

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
PERIOD_US = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """``cpu_share``: of one core, for each peer; ``replicas``: of each shard."""

    replicas: int = 1
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    sequences: int = 4
    length: int = 128
    # Spans drain for each inner step: simulated, 16 and 6 leave four spans idle for a fifth of the time, these a tenth.
    step_microbatches: int = 32
    max_in_flight: int = 8
    hop_codec: str = "int8"
    cpu_share: float = 0.45
    warm_up_s: float = 15.0
    measured_s: float = 40.0
    timeout_s: float = 120.0

    @property
    def setting(self) -> Setting:
        import dataclasses

        return dataclasses.replace(
            SMALL,
            **{"hidden": self.hidden, "intermediate": 3 * self.hidden, "layers": self.layers, "heads": self.heads},
            **{"sequences": self.sequences, "length": self.length},
        )

    @property
    def tokens_per_microbatch(self) -> int:
        return self.sequences * self.length

    def shards(self, count: int) -> tuple[Span, ...]:
        return from_sizes([self.layers // count] * count)

    def spec(self, *, in_8_bits: bool = True) -> Any:
        spec = spec_of(self.setting, in_8_bits=in_8_bits, is_synchronous=False)
        # A copy that nothing checks: more than one shard unties embedding and head, on every side.
        return spec.model_copy(update={"num_shards": 2})

    def config(self) -> Any:
        return model.build_config(self.spec(), VOCAB)

    def batch(self, number: int) -> np.ndarray:
        """[B, L+1]"""
        return read_text().batch(self.setting, 0, 0, number)


def hold_to(share: float, name: str) -> None:
    """This process, and all that it starts, gets ``share`` of one core, whatever else runs on the machine.

    Raises `OSError` without such control.
    """
    quota_us = int(share * PERIOD_US)
    folder = (V1 if V1.is_dir() else V2) / f"swarm-bench-{os.getppid()}-{name}"
    folder.mkdir(exist_ok=True)
    if V1.is_dir():
        (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        (folder / "cpu.shares").write_text("65536")
    else:
        (folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        (folder / "cpu.weight").write_text("10000")
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def remove_quotas() -> None:
    """Those of processes that this one started, once they have ended."""
    for folder in (V1 if V1.is_dir() else V2).glob(f"swarm-bench-{os.getpid()}-*"):
        try:
            folder.rmdir()
        except OSError:  # somebody in it is just ending: the empty group is removed with the next run's
            continue


def optimizer_of(module: Any, task: Task) -> Any:
    import torch

    return build_optimizer(list(module.parameters()), task.spec(in_8_bits=False).inner, torch.device("cpu"))
