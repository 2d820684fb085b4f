"""The quality benchmark compares what it says: same weights, same tokens, rounds as a peer makes them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import quality
import quality_results
from quality_arms import ARMS, PlainSwarm, Swarm, train
from quality_setting import QUICK, REPLICAS, Setting, Text, spec_of

from peer.rounds.blocks import Blocks
from peer.rounds.outer import OuterStep, outer_step

SHORT = QUICK.changed(["total_tokens=8192", "tokens_per_round=4096", "validation_sequences=32"])
RANDOM = np.random.default_rng(0)
TEXT = Text(training=RANDOM.integers(0, 256, 20_000), validation=RANDOM.integers(0, 256, 20_000), num_files=2)


def spec(setting: Setting, *, in_8_bits: bool) -> object:
    return spec_of(setting, in_8_bits=in_8_bits, is_synchronous=False)


def test_with_plain_averaging_a_round_of_the_fp32_twin_ends_at_the_mean_of_its_replicas() -> None:
    """Momentum 0 and an outer learning rate of 1 leave nothing but the mean, to fp32 rounding."""
    swarm = PlainSwarm(spec(SHORT.changed(["outer_momentum=0", "outer_learning_rate=1"]), in_8_bits=False), seed=1)
    for index, replica in enumerate(swarm.replicas):
        replica.step(TEXT.batch(SHORT, 1, index, 0), 1e-2)
    weights = [replica.read() for replica in swarm.replicas]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    swarm.commit(tokens_each=512)
    np.testing.assert_allclose(swarm.anchor, np.mean(weights, axis=0), atol=1e-6)
    np.testing.assert_allclose(swarm.replicas[2].read(), swarm.anchor, atol=1e-7)


def test_the_fp32_twin_makes_the_outer_step_of_a_run() -> None:
    """Two rounds with momentum end where the engine's own outer step ends, but for its 8-bit momentum."""
    setting = SHORT.changed(["outer_momentum=0.5", "momentum_warmup_rounds=0"])
    swarm = PlainSwarm(spec(setting, in_8_bits=False), seed=1)
    anchor, momentum = swarm.anchor.copy(), Blocks(len(swarm.anchor))
    step = OuterStep(learning_rate=1.0, momentum_factor=0.5, round=1)
    for round_number in (0, 1):
        for index, replica in enumerate(swarm.replicas):
            replica.step(TEXT.batch(setting, 1, index, round_number), 1e-2)
        gradient = -np.mean([replica.movement()[:] for replica in swarm.replicas], axis=0, dtype=np.float32)
        outer_step(anchor, momentum, 0, gradient, step)
        swarm.commit(tokens_each=512)
    moved = np.linalg.norm(gradient)
    assert np.linalg.norm(swarm.anchor - anchor) < 0.01 * moved


def test_8_bit_replicas_travel_in_the_codec_of_the_run() -> None:
    """The int8 arm keeps the codec that its spec names, and owes what that codec could not say."""
    chosen = spec(SHORT, in_8_bits=True)
    swarm = Swarm(chosen, seed=1)
    assert {shard.codec.name for shard in swarm.shards} == {chosen.rounds.wire_codec}
    for index, replica in enumerate(swarm.replicas):
        replica.step(TEXT.batch(SHORT, 1, index, 0), 1e-2)
    swarm.commit(tokens_each=512)
    assert all(shard.owed(slice(0, 4096)).any() for shard in swarm.shards)


def test_all_arms_begin_alike_and_end_after_the_same_tokens() -> None:
    """One seed gives all arms the same first weights (in 8 bits: rounded) and the same number of tokens."""
    ends = {name: list(train(arm, SHORT, TEXT, 3))[-1] for name, arm in ARMS.items()}
    assert {tokens for tokens, _ in ends.values()} == {SHORT.total_tokens}
    assert all(0 < loss < 7 for _, loss in ends.values())
    np.testing.assert_array_equal(
        Swarm(spec(SHORT, in_8_bits=True), 3).anchor, PlainSwarm(spec(SHORT, in_8_bits=False), 3).anchor
    )


def test_a_batch_depends_on_seed_replica_and_step_alone() -> None:
    """The same three give the same bytes, any other gives others."""
    first = TEXT.batch(SHORT, 0, 1, 2)
    assert first.shape == (SHORT.sequences, SHORT.length + 1)
    np.testing.assert_array_equal(first, TEXT.batch(SHORT, 0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert (first != TEXT.batch(SHORT, *other)).any()
    assert SHORT.tokens_per_step == REPLICAS * first[:, 1:].size


def test_gaps_are_in_percent_with_the_standard_error_of_their_mean() -> None:
    """Two seeds, 1 % and 3 % apart: 2 % with an error of 1; a missing arm is no gap."""
    arms = {
        name: {"loss": loss, "curve": [], "cpu_s": 1, "commit": ""} for name, loss in (("int8", 2.02), ("fp32", 2.0))
    }
    other = {**arms, "int8": {**arms["int8"], "loss": 2.06}}
    figures = quality.summarise({0: arms, 1: other})
    assert figures["gap_int8_percent"] == pytest.approx(2)
    assert figures["gap_int8_percent_standard_error"] == pytest.approx(1)
    assert figures["gap_local_percent"] is None and figures["gap_local_percent_by_seed"] == []


def test_an_arm_of_another_setting_is_neither_reused_nor_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of finished arms belongs to one setting."""
    monkeypatch.setattr(quality_results, "read_text", lambda: TEXT)
    (tmp_path / "quick-0-sync.json").write_text('{"setting": {}, "text_sha256": ""}')
    with pytest.raises(SystemExit, match="another setting"):
        quality_results.make(tmp_path, "quick", ARMS["sync"], SHORT, 0)
