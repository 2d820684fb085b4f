"""The tensor side on a CUDA device: the same code as on the CPU, and the same results within rounding.

Every test runs on the CPU as well, so that it is known to work where no device is at hand.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from peer.training import device, model
from peer.training.fp32_replica import Replica
from peer.training.int8_replica import Int8Replica
from peer.training.trainer import Hooks, Limits, Trainer
from swarm.run_spec import Inner, RunSpec

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_CUDA)]
KINDS = [(Replica, "adamw"), (Replica, "adamw8bit"), (Int8Replica, "adamw8bit")]
AnyReplica = Replica | Int8Replica

VOCAB_SIZE, LENGTH = 512, 64
SPEC = RunSpec(
    name="gpu",
    total_tokens=1,
    organizer_key="0" * 64,
    publication_key="1" * 64,
    model={
        "family": "llama",
        "config": {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": 128,
        },
    },
    data={"manifest_digest": "0" * 64, "tokenizer_digest": "0" * 64, "sequence_length": LENGTH},
)


def make(name: str, kind: type[AnyReplica], optimizer: str = "adamw8bit") -> AnyReplica:
    built = model.build_model(model.build_config(SPEC, VOCAB_SIZE), 0)
    inner = Inner(optimizer=optimizer, learning_rate=3e-3)  # type: ignore[arg-type]
    return kind(built, model.layout_of(built), inner, device.choose(name))


def batch(seed: int) -> np.ndarray:
    """Sequences that count upwards from a random start: easy to learn."""
    start = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (8, 1))
    return ((start + np.arange(LENGTH + 1)) % VOCAB_SIZE).astype(np.int64)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("kind", "optimizer"), KINDS)
def test_inner_steps_learn(name: str, kind: type[AnyReplica], optimizer: str) -> None:
    replica = make(name, kind, optimizer)
    losses = [replica.step(batch(number), 3e-3).loss for number in range(60)]
    assert losses[-1] < losses[0] / 2


@NO_CUDA
@pytest.mark.parametrize("kind", [Replica, Int8Replica])
def test_cuda_and_cpu_measure_the_same_loss(kind: type[AnyReplica]) -> None:
    anchor = make("cpu", Replica).read()
    losses = [make(name, kind).evaluate(anchor, [batch(1)]) for name in ("cpu", "cuda")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2), "bf16 where the device computes in it"


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("kind", "allowed"), [(Replica, 1e-6), (Int8Replica, 2e-2)])
def test_landing_keeps_the_movement_since_the_snapshot(name: str, kind: type[AnyReplica], allowed: float) -> None:
    """In 8 bits within a code of the largest weight of a block, and what is carried agrees with what was done."""
    replica = make(name, kind)
    snapshot = replica.movement()
    before = replica.read()
    replica.step(batch(1), 3e-3)
    moved = replica.read() - before
    anchor = np.full_like(before, 0.5)
    replica.land(anchor, snapshot)
    np.testing.assert_allclose(replica.read(), anchor + moved, atol=allowed)
    np.testing.assert_allclose(replica.movement()[:], moved, atol=allowed / 100 + 1e-6)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("kind", [Replica, Int8Replica])
def test_the_trainer_runs_beside_an_event_loop(name: str, kind: type[AnyReplica]) -> None:
    async def main() -> None:
        trainer = Trainer(make(name, kind), Hooks(next_batch=batch, learning_rate=lambda: 3e-3), Limits())
        trainer.start()
        for _ in range(300):
            if trainer.stats.steps >= 10:
                break
            await asyncio.sleep(0.1)
        snapshot = await trainer.snapshot()
        await trainer.stop(10)
        assert snapshot.stats.steps >= 10 and np.isfinite(snapshot.movement[:]).all()

    asyncio.run(main())


@NO_CUDA
def test_the_device_is_described_by_name_and_memory() -> None:
    assert "GiB" in device.describe(device.choose("cuda"))
