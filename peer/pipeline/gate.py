"""The gate of a span: how many microbatches are admitted, and when the inner step is due.

Pure. Decides that at most ``max_in_flight`` microbatches hold activations, that no more are admitted than the inner
step still wants (those that failed make room for others), and that none is while weights change: who comes then is told
*busy*. At the last place, what is read here takes turns with what others send. Leaves waiting to `peer.pipeline.hop`,
and what has counted (``gathered``) to `peer.pipeline.steps`.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.errors import Busy, ConfigError


@dataclass(slots=True, kw_only=True)
class Gate:
    step_microbatches: int
    max_in_flight: int
    in_flight: int = 0
    is_changing: bool = False
    """the weights are about to change, or change"""
    is_paused: bool = False
    owes_turn: bool = False
    """somebody else was told *busy* since one of our own was admitted, and nobody else's has been admitted since"""

    def __post_init__(self) -> None:
        if self.step_microbatches < 1 or self.max_in_flight < 1:
            raise ConfigError("an inner step, and what is in flight, is at least one microbatch")

    def refusal(self, gathered: int) -> str:
        """Why nothing is admitted now; empty where the next one is."""
        if self.is_paused:
            return "training is paused"
        if self.is_changing or self.is_full(gathered):
            return "an inner step is due"
        if self.in_flight >= self.max_in_flight:
            return f"{self.in_flight} microbatches are in flight"
        return ""

    def is_full(self, gathered: int) -> bool:
        """Nothing more is wanted, if all that is in flight counts."""
        return gathered + self.in_flight >= self.step_microbatches

    def is_due(self, gathered: int) -> bool:
        """The inner step may be made."""
        return gathered >= self.step_microbatches

    @property
    def yields(self) -> bool:
        """One of our own would take the last place, which is somebody else's turn."""
        return self.owes_turn and self.in_flight + 1 >= min(self.max_in_flight, self.step_microbatches)

    def enter(self, gathered: int, *, is_own: bool = False) -> None:
        """One more microbatch; ``is_own``: of data that was read here. Raises `Busy`."""
        refusal = self.refusal(gathered)
        if refusal:
            self.owes_turn |= not is_own and not self.is_paused
            raise Busy(f"busy: {refusal}")
        self.owes_turn = False
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
