"""What a peer's start imports: each second of it is a second that a volunteer who comes back does not train."""

from __future__ import annotations

import subprocess
import sys

from tests.unit.small_models import VOCAB

CODE = f"""
import sys, time
from peer.p2p import hivemind_door
from peer.training import model
from peer.training.inner_optimizer import code_maps
from tests.unit.small_models import small_spec
import torch
hivemind_door.load(time.time, debug=False)
config = model.build_config(small_spec("llama"), {VOCAB})
model.build_model(config, 0)
code_maps(torch.device("cpu"))
print(*sys.modules)
"""
LARGE = ("scipy", "hivemind.averaging", "hivemind.moe", "torch._inductor.compile_fx")


def test_a_peer_builds_its_model_and_network_without_importing_what_training_never_uses() -> None:
    """Solvers, averagers, experts and compilers: about two seconds of a processor."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    loaded = done.stdout.split()
    assert {"hivemind.dht.node", "transformers.modeling_utils", "bitsandbytes"} <= set(loaded)
    assert [name for name in LARGE if name in loaded] == []
