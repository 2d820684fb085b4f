"""The uplink: a limit that holds over time, and a rate that slow receivers and small calls do not spoil."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.p2p.uplink import BURST_BYTES, LARGE_BYTES, LAST_BURSTS, SMALL_FRAME_BYTES, Pacer, UplinkMeter

MIB = 1 << 20


@given(st.lists(st.tuples(st.integers(1, MIB), st.floats(0, 2)), min_size=1, max_size=60))
def test_frames_never_leave_faster_than_the_limit(frames: list[tuple[int, float]]) -> None:
    """Whoever waits for the line: what left before fits the limit, whatever pauses there were."""
    now, sent_bytes, pacer = 0.0, 0, Pacer(8_000_000)
    for size, pause in frames:
        now += pause
        now += pacer.wait_s(now)
        assert 8 * sent_bytes <= 8_000_000 * now + 1e-3
        pacer.leave(size, now)
        sent_bytes += size


def test_without_a_limit_nothing_waits() -> None:
    pacer = Pacer(None)
    pacer.leave(100 * MIB, 0.0)
    assert pacer.wait_s(0.0) == 0.0 and pacer.frame_bytes(MIB) == MIB


def test_a_pause_is_not_saved_up() -> None:
    """After a quiet hour the line is not flooded for an hour."""
    pacer = Pacer(8_000_000)
    for _ in range(2):
        pacer.leave(MIB, 3600.0)
    assert pacer.wait_s(3600.0) == pytest.approx(2 * MIB / 1e6)


@pytest.mark.parametrize(("limit_bps", "size"), [(100_000, SMALL_FRAME_BYTES), (8_000_000, 250_000), (10**9, MIB)])
def test_a_slow_line_has_small_frames(limit_bps: int, size: int) -> None:
    """So that nobody waits long for a turn; a frame is never so small that it would wait for none."""
    assert Pacer(limit_bps).frame_bytes(MIB) == size


def burst(meter: UplinkMeter, began_at: float, sizes: list[int], took_s: float) -> None:
    for size in sizes:
        meter.began(size, began_at)
    for size in sizes:
        meter.ended(size, began_at + took_s, arrived=True)


def test_requests_side_by_side_are_one_burst() -> None:
    """Two that share the line for two seconds show the whole line, not half of it each."""
    meter = UplinkMeter()
    assert meter.bps is None
    burst(meter, 10.0, [MIB, MIB], 2.0)
    assert meter.bps == 8 * MIB


def test_the_best_of_the_last_bursts_counts() -> None:
    """A slow receiver makes a burst slow; an uplink that became slower shows after some bursts."""
    meter = UplinkMeter()
    burst(meter, 0.0, [MIB], 1.0)
    burst(meter, 5.0, [MIB], 4.0)
    assert meter.bps == 8 * MIB
    for index in range(LAST_BURSTS):
        burst(meter, 100.0 * index + 100, [MIB], 4.0)
    assert meter.bps == 2 * MIB


def test_what_did_not_arrive_or_is_small_says_nothing() -> None:
    """A call that nobody answered may have left at any rate, and a small one is all way and no line."""
    meter = UplinkMeter()
    meter.began(MIB, 0.0)
    meter.ended(MIB, 0.001, arrived=False)
    burst(meter, 1.0, [LARGE_BYTES - 1] * 20, 0.001)
    burst(meter, 2.0, [BURST_BYTES - 1], 0.001)
    assert meter.bps is None


def test_a_lost_call_within_a_burst_does_not_end_it() -> None:
    meter = UplinkMeter()
    meter.began(MIB, 0.0)
    meter.began(MIB, 0.0)
    meter.ended(MIB, 0.5, arrived=False)
    meter.ended(MIB, 1.0, arrived=True)
    assert meter.bps == 8 * MIB


@pytest.mark.parametrize("answers", [True, False])
def test_a_receiver_that_is_slow_or_hangs_hides_nothing(answers: bool) -> None:
    """Nine of ten were served in a second; the tenth takes a minute, or never answers."""
    meter = UplinkMeter()
    for _ in range(10):
        meter.began(MIB, 0.0)
    for _ in range(9):
        meter.ended(MIB, 1.0, arrived=True)
    assert meter.bps == 9 * 8 * MIB, "known while it hangs"
    meter.ended(MIB, 60.0, arrived=answers)
    assert meter.bps == 9 * 8 * MIB
