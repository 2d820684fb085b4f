"""Work beside training takes at most its share of the time."""

from peer.training.allowance import Allowance


def test_work_is_free_until_some_was_done() -> None:
    assert Allowance(0.1, lambda: 0.0).is_free


def test_what_was_spent_is_made_up_for_before_more_is_free() -> None:
    times_s = iter((100.0, 100.0, 117.9, 118.0))
    allowance = Allowance(0.1, lambda: next(times_s))
    allowance.spend(2.0)
    assert [allowance.is_free for _ in range(3)] == [False, False, True], "2 s are a tenth of 20"


def test_work_that_was_done_before_it_was_free_shortens_nothing() -> None:
    now_s = 100.0
    allowance = Allowance(0.1, lambda: now_s)
    allowance.spend(10.0)
    now_s += 1.0
    allowance.spend(1.0)
    now_s = 199.9
    assert not allowance.is_free, "90 s and 9 s are to be made up for, none of it while the second was done"
    now_s = 200.1
    assert allowance.is_free


def test_work_done_whenever_it_is_free_keeps_to_its_share() -> None:
    now_s, spent_s = 0.0, 0.0
    allowance = Allowance(0.03, lambda: now_s)
    while now_s < 1000.0:
        if allowance.is_free:
            now_s, spent_s = now_s + 1.5, spent_s + 1.5
            allowance.spend(1.5)
        now_s += 0.25
    assert 0.02 < spent_s / now_s <= 0.0315
