"""What a machine takes on: measured room, the choice by the memory plan, and a replica without fp32 weights."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.training import device, hosting, model, room
from peer.training.fp32_replica import Replica
from peer.training.hosting import build_replica, choose_hosting
from peer.training.int8_replica import Int8Replica
from peer.training.microbatches import Microbatch
from peer.training.room import host_bytes, measure_room
from swarm.errors import DeviceError, ResourceError
from swarm.families import FAMILIES
from swarm.fitting import GIB, Room
from swarm.run_spec import Inner, RunSpec
from tests.unit.live_bytes import LiveBytes
from tests.unit.small_models import LENGTH, NUM_LAYERS, VOCAB, small_spec

CPU = torch.device("cpu")
MIB = 1 << 20
KEY = b"k" * 32


def of_inner(spec: RunSpec, **inner: Any) -> RunSpec:
    return spec.model_copy(update={"inner": Inner(**inner)})


def with_room(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(
        hosting, "measure_room", lambda device, limit: Room(device_bytes=num_bytes, host_bytes=num_bytes)
    )


def tokens(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (batch, LENGTH + 1))


# ---- room -----------------------------------------------------------------------------------------------------------


MEMINFO = "MemTotal:       8388608 kB\nMemFree:          100000 kB\nMemAvailable:   4194304 kB\n"
GROUPS: list[tuple[str, dict[str, str], int]] = [
    ("no control groups", {}, 4 * GIB),
    (
        "the second version",
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/a/b/memory.current": f"{GIB}\n",
        },
        2 * GIB,
    ),
    (
        "cached files do not count as used",
        {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        },
        5 * GIB // 2,
    ),
    (
        "a tighter group above",
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/a/memory.current": "0\n",
        },
        GIB,
    ),
    (
        "the first version",
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        GIB,
    ),
    (
        "a container that sees its own group as the root",
        {
            "proc/self/cgroup": "0::/../outside/of/here\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
        },
        0,
    ),
    ("nonsense", {"proc/self/cgroup": "x\n\n:::\n", "sys/fs/cgroup/memory.max": "-5"}, 4 * GIB),
]


@pytest.mark.parametrize(("name", "texts", "expected"), GROUPS, ids=[case[0] for case in GROUPS])
def test_what_is_free_on_the_host(name: str, texts: dict[str, str], expected: int, tmp_path: Path) -> None:
    """Available memory, or what the tightest control group has left."""
    for path, text in {"proc/meminfo": MEMINFO, **texts}.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    assert host_bytes(tmp_path) == expected


def test_where_the_system_says_nothing_all_memory_counts(tmp_path: Path) -> None:
    assert host_bytes(tmp_path) > 64 * MIB


def test_a_limit_is_of_all_memory_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "host_bytes", lambda: 8 * GIB)
    assert measure_room(CPU) == Room(device_bytes=8 * GIB, host_bytes=8 * GIB)
    assert measure_room(CPU, 2 * GIB) == Room(device_bytes=2 * GIB, host_bytes=2 * GIB)
    assert measure_room(CPU, 20 * GIB) == measure_room(CPU)


def test_a_limit_is_of_the_devices_memory_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process already holds there counts as free: a replica that diverged makes way for the next."""
    monkeypatch.setattr(room, "host_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    cuda = torch.device("cuda", 0)
    assert measure_room(cuda) == Room(device_bytes=6 * GIB, host_bytes=8 * GIB)
    assert measure_room(cuda, 4 * GIB) == Room(device_bytes=4 * GIB, host_bytes=8 * GIB)


def test_torch_is_held_to_the_limit_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: held.append(share))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 8 * GIB}))
    device.limit_memory(torch.device("cuda", 0), 2 * GIB)
    device.limit_memory(torch.device("cuda", 0), 20 * GIB)
    device.limit_memory(CPU, GIB)
    assert held == [0.25, 1.0]


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["int8", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_room_enough_the_whole_model_is_taken_and_trains(family: str, weights: str) -> None:
    spec = of_inner(small_spec(family), weights=weights, microbatch_sequences=3)
    chosen = choose_hosting(spec, VOCAB, "cpu")
    assert chosen.choice.plan.span.is_whole and chosen.choice.batch == 3
    assert chosen.choice.reason.startswith(f"layers 0-{NUM_LAYERS - 1} + embedding + head: 0.00 GiB of ")
    replica = build_replica(chosen, spec, KEY)
    anchor = model.initial_anchor(chosen.config, 1)
    replica.load(anchor)
    result = replica.step(tokens(3), 1e-3)
    assert result.ok and result.num_microbatches == 1
    assert replica.evaluate(anchor, [tokens(3)]) == pytest.approx(np.log(VOCAB), rel=0.2)


def test_where_a_batch_does_not_fit_fewer_sequences_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as fit: what the plan halves, the replica keeps to."""
    spec = of_inner(small_spec("llama"), microbatch_sequences=64)
    plans = {size: choose_hosting(of_inner(spec, microbatch_sequences=size), VOCAB, "cpu") for size in (16, 64)}
    needs = [plan.choice.plan.device_bytes + plan.choice.plan.host_bytes for plan in plans.values()]
    assert needs[1] > 2 * needs[0]
    with_room(monkeypatch, int(needs[0] * 1.2))
    chosen = choose_hosting(spec, VOCAB, "cpu")
    assert chosen.choice.batch == 16 and "16 of 64 sequences at once" in chosen.choice.reason
    replica = build_replica(chosen, spec, KEY)
    replica.load(model.initial_anchor(chosen.config, 1))
    assert replica.step(tokens(64), 1e-3).num_microbatches == 4


def test_where_nothing_fits_it_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "build_model", None)
    with pytest.raises(ResourceError, match=r"wants 0\.00 GiB of 0\.00 GiB and 7% to spare") as caught:
        choose_hosting(small_spec("llama"), VOCAB, "cpu", 50_000)
    assert caught.value.exit_code == 74 and "--memory" in caught.value.advice


def test_a_device_that_is_not_there_is_told_first() -> None:
    with pytest.raises(DeviceError):
        choose_hosting(small_spec("llama"), VOCAB, "cuda:99")


def test_of_several_shards_as_many_as_fit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any list of shards: a machine with less room builds and trains a smaller span."""
    spec = of_inner(small_spec("llama"), microbatch_sequences=1).model_copy(update={"num_shards": 3})
    needed = choose_hosting(spec, VOCAB, "cpu").choice.plan
    with_room(monkeypatch, (needed.device_bytes + needed.host_bytes) * 3 // 4)
    chosen = choose_hosting(spec, VOCAB, "cpu")
    span = chosen.choice.plan.span
    assert 0 < span.size < NUM_LAYERS
    replica = build_replica(chosen, spec, KEY)
    replica.load(model.initial_anchor(chosen.config, 1, span))
    assert len(replica.movement()) == chosen.choice.plan.num_values


def test_a_span_too_takes_fewer_sequences_at_once_where_a_microbatch_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It answers microbatches of the run's size all the same, in pieces."""
    spec = of_inner(small_spec("llama"), microbatch_sequences=64).model_copy(update={"num_shards": 2})
    fits = choose_hosting(of_inner(spec, microbatch_sequences=16), VOCAB, "cpu").fits[-1].plan
    with_room(monkeypatch, int((fits.device_bytes + fits.host_bytes) * 1.2))
    chosen = choose_hosting(spec, VOCAB, "cpu")
    assert chosen.choice.batch < 64 and chosen.choice.pieces * chosen.choice.batch >= 64
    assert not chosen.choice.plan.span.is_whole and chosen.max_in_flight >= 1
    replica = build_replica(chosen, spec, KEY)
    span = chosen.choice.plan.span
    replica.load(model.initial_anchor(chosen.config, 1, span))
    replica.begin_step(1e-3)
    hidden = None if span.has_embedding else torch.zeros(64, LENGTH, chosen.config.hidden_size)
    given = Microbatch(tokens=tokens(64), weight=1 / tokens(64)[:, 1:].size, hidden_BLH=hidden)
    passed = replica.forward(given)
    gradient = None if span.has_head else torch.ones_like(passed.result_BLH)
    trained = replica.backward(passed, gradient)
    assert np.isfinite(trained.loss) and replica.finish_step(1).ok


# ---- the replica ----------------------------------------------------------------------------------------------------

LARGE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def test_fp32_weights_of_an_8_bit_replica_never_exist() -> None:
    """From building to the first step on an anchor, its device never holds more than the plan says of a step."""
    spec = of_inner(small_spec("llama", **LARGE), microbatch_sequences=1)
    chosen = choose_hosting(spec, VOCAB, "cpu")
    planned, anchor = chosen.choice.plan, model.initial_anchor(chosen.config, 1)
    gc.collect()
    with LiveBytes() as live:
        replica = build_replica(chosen, spec, KEY)
        assert isinstance(replica, Int8Replica)
        building, live.peak = live.peak, 0
        replica.load(anchor)
        loading, live.peak = live.peak, 0
        replica.step(tokens(1), 1e-3)
    start = planned.host["start"]  # on the host: codes and scales of where it started
    fp32_bytes = 4 * planned.num_values
    assert building <= planned.held_bytes + start + MIB < fp32_bytes + start
    assert loading <= planned.held_bytes + 2 * start + 3 * MIB < fp32_bytes + 2 * start
    assert live.peak <= (planned.device_bytes + start) * 1.1


def test_two_peers_round_differently_and_one_always_alike() -> None:
    spec = small_spec("llama")
    chosen = choose_hosting(spec, VOCAB, "cpu")
    anchor = model.initial_anchor(chosen.config, 1)
    ends = []
    for key in (KEY, KEY, b"o" * 32):
        replica: Any = build_replica(chosen, spec, key)
        replica.load(anchor)
        ends.append(replica.read().tobytes())
    assert ends[0] == ends[1] != ends[2]


def test_fp32_weights_are_taken_where_the_rules_say_so() -> None:
    spec = of_inner(small_spec("llama", tied=True), weights="fp32", optimizer="adamw")
    replica = build_replica(choose_hosting(spec, VOCAB, "cpu"), spec, KEY)
    assert isinstance(replica, Replica)
