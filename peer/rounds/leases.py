"""Leases: who may vote, and who may be declared gone. Docs: docs/decisions/0013.

Decides from what was heard and answered, and when; leaves asking, and the clock (which counts sleep), to
`peer.rounds.hearing`. Whoever calls holds the lease of whoever answers from when it asked; who answers counts from when
the call came. So a holder knows that it is out before anybody may go on without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.log import LogHead

ASK_AGAIN_S = 1.0
JUST_BEFORE_S = 3.0
NEVER = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What leases allow a voter at this moment."""

    held: frozenset[bytes] = frozenset()
    """voters whose lease it holds, and itself"""
    silent: frozenset[bytes] = frozenset()
    """voters whose lease from it has run out"""
    present: bool = False
    """it holds the leases of a majority, and has caught up since it did not"""

    def may_decide(self, head: LogHead, gone: tuple[bytes, ...]) -> bool:
        """Whether it may promise and vote in a ballot that goes on without ``gone``."""
        if not gone:
            return self.present
        return self.silent.issuperset(gone) and head.decides(self.held, gone)

    def gone(self, head: LogHead) -> tuple[bytes, ...]:
        """Whom a ballot of ours has to declare gone; nobody while the others may still decide with us."""
        silent = tuple(sorted(self.silent.intersection(head.voters)))
        return silent if head.may_be_gone(silent) else ()


class Leases:
    """Of one replica, in one shard. All times are seconds of one clock that counts sleep."""

    def __init__(self, me: bytes, head: LogHead, lease_s: float, now: float) -> None:
        self._me, self._lease_s = me, lease_s
        self._looked_at = now
        self._heard: dict[bytes, float] = {}
        self._held: dict[bytes, float] = {}
        self._asked: dict[bytes, float] = {}
        self._majority_since: float | None = None
        self._tried: dict[bytes, float] = {}
        """when voters answered last without being further on, or could not be reached"""
        self._present = self._has_left = False
        self._head = head
        self.begin(head, now)

    def begin(self, head: LogHead, now: float) -> None:
        """The round after ``head``: the leases of those who were no voters before begin now."""
        self._head = head
        self._heard = {voter: self._heard.get(voter, now) for voter in head.voters if voter != self._me}
        self._held = {peer: at for peer, at in self._held.items() if at + self._lease_s > now}
        self._asked = {peer: at for peer, at in self._asked.items() if peer in self._heard}
        self._tried = {peer: at for peer, at in self._tried.items() if peer in self._heard}

    def heard(self, peer: bytes, now: float) -> None:
        """``peer`` called: from here on it has a whole lease of ours."""
        self._notice_sleep(now)
        if peer in self._heard:
            self._heard[peer] = now

    def left(self, peer: bytes) -> None:
        """``peer`` said that it goes and votes no more."""
        if peer in self._heard:
            self._heard[peer] = NEVER

    def leave(self) -> None:
        """We go: from here on we promise nothing and vote for nothing."""
        self._has_left = True

    def answered(self, peer: bytes, asked_at: float, further_on: bool = False) -> None:
        """``peer`` answered what we asked at ``asked_at``; ``further_on``: it works towards a later round than we."""
        self._held[peer] = max(asked_at, self._held.get(peer, NEVER))
        if further_on:
            self._tried.pop(peer, None)
        else:
            self._tried[peer] = asked_at

    def failed(self, peer: bytes, now: float) -> None:
        """``peer`` could not be reached, or did not answer in time."""
        self._tried[peer] = now

    def due(self, now: float) -> list[bytes]:
        """Voters to be asked now, if we are one; they are taken to be asked."""
        self.standing(now)
        if self._me not in self._head.voters or self._has_left:
            return []
        due = [
            voter
            for voter in self._heard
            if now - self._asked.get(voter, NEVER) >= ASK_AGAIN_S
            and (
                now - self._held.get(voter, NEVER) >= self._lease_s / 3
                or (self._majority_since is not None and not self._present and not self._was_tried(voter))
            )
        ]
        self._asked |= dict.fromkeys(due, now)
        return due

    def standing(self, now: float) -> Standing:
        self._notice_sleep(now)
        held = {voter for voter in self._heard if self._held.get(voter, NEVER) + self._lease_s > now} | {self._me}
        if self._has_left or not self._head.decides(held):
            self._majority_since, self._present = None, False
        elif self._majority_since is None:
            self._majority_since = now
        if self._majority_since is not None and not self._present:
            waited_s = now - self._majority_since
            self._present = all(map(self._was_tried, self._heard)) or waited_s >= self._lease_s
        silent = {voter for voter, at in self._heard.items() if at + self._lease_s <= now}
        return Standing(
            held=frozenset() if self._has_left else frozenset(held), silent=frozenset(silent), present=self._present
        )

    def _was_tried(self, voter: bytes) -> bool:
        """Since, or just before, a majority's leases are held again."""
        return self._tried.get(voter, NEVER) > (self._majority_since or 0.0) - JUST_BEFORE_S

    def _notice_sleep(self, now: float) -> None:
        """We are asked what stands at least once a second; a long gap was ours, not the others' silence."""
        if now - self._looked_at > self._lease_s / 3:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked_at = now
