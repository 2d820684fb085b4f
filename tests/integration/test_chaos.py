"""Rounds of real processes under kills, stalls and partitions: the benchmark of them, for a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.netlab.lab import why_not

CHAOS = Path(__file__).parents[2] / "scripts" / "bench" / "chaos.py"


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_a_minute_of_faults_leaves_survivors_equal_and_loses_nothing() -> None:
    """Every round ends within its deadlines, whoever is hurt; a failure prints its seed and what happened."""
    command = [sys.executable, str(CHAOS), "--quick", "--rounds", "12", "--sides", "ours"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    found = {key: figures[key] for key in ("faults", "unequal_survivors", "hangs", "lost")}
    assert found == {"faults": 12, "unequal_survivors": 0, "hangs": 0, "lost": 0}, done.stdout
    assert figures["rounds"] >= 12
