"""How often work beside training may be done, so that it takes at most a share of the time.

Pure but for the clock that it is given. Leaves what the work is to its caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Allowance:
    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``share``: of the time, above 0 and at most 1; ``clock`` gives seconds."""
        self._share, self._clock, self._free_at_s = share, clock, -math.inf

    @property
    def is_free(self) -> bool:
        """Whether what was spent before is made up for."""
        return self._clock() >= self._free_at_s

    def spend(self, seconds: float) -> None:
        """Tell that the work has just taken ``seconds``; what earlier work has yet to be made up for adds to it."""
        made_up_from_s = max(self._clock(), self._free_at_s + seconds)
        self._free_at_s = made_up_from_s + seconds * (1 / self._share - 1)
