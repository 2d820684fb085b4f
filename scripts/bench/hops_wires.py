"""How hidden states and gradients cross a hop in `hops`: the codecs of a run, and a subspace scheme beside them.

The subspace scheme is in the spirit of Protocol Models (arXiv 2506.01260). What layers write into the residual stream
is held within a fixed random subspace of ``rank`` dimensions: after every inner step the matrices that write
(attention's and the MLP's output, and what the embedding learned) are projected onto it. So hidden states are the first
embedding of their tokens, which both ends know, plus ``rank`` numbers; and of a gradient only its part within the
subspace reaches any weight. Both travel as int8. Nothing of it is approximate but the int8; what it costs is what the
model can no longer express. Leaves training to `hops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from peer.pipeline.hop_codec import HOP_CODECS, Noise, draw
from peer.training.fp32_replica import Replica


class CodecWire:
    """Hidden states and gradients by one of the run's hop codecs."""

    def __init__(self, codec: str) -> None:
        self._codec = HOP_CODECS[codec]
        self.name = codec
        self.sent_bytes = 0

    def begin(self, replicas: Sequence[Replica]) -> None:
        """Nothing to prepare."""

    def after_step(self, replicas: Sequence[Replica]) -> None:
        """Weights may be anything."""

    def onward(self, hidden_BLH: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        return self._cross(hidden_BLH)

    def back(self, gradient_BLH: torch.Tensor) -> torch.Tensor:
        return self._cross(gradient_BLH, draw)

    def _cross(self, values: torch.Tensor, noise: Noise | None = None) -> torch.Tensor:
        data = self._codec.encode(values, noise)
        self.sent_bytes += len(data)
        return self._codec.decode(data, tuple(values.shape))


class SubspaceWire(CodecWire):
    """``rank`` int8 numbers a token, for a LLaMA whose writing matrices are held within the subspace."""

    def __init__(self, rank: int) -> None:
        super().__init__("int8")
        self.name, self._rank = f"subspace{rank}", rank

    def begin(self, replicas: Sequence[Replica]) -> None:
        embedding: Any = replicas[0]._model.get_input_embeddings()  # type: ignore[operator]
        self._first_VH = embedding.weight.detach().clone()
        width = self._first_VH.shape[1]
        random = torch.randn((width, self._rank), generator=torch.Generator().manual_seed(7))
        self._basis_HK = torch.linalg.qr(random).Q.contiguous()
        self.after_step(replicas)

    def after_step(self, replicas: Sequence[Replica]) -> None:
        basis_HK = self._basis_HK
        with torch.no_grad():
            for replica in replicas:
                for name, weight in replica._model.named_parameters():
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        weight.copy_(basis_HK @ (basis_HK.t() @ weight))
                    elif name.endswith("embed_tokens.weight"):
                        weight.copy_(self._first_VH + (weight - self._first_VH) @ basis_HK @ basis_HK.t())

    def onward(self, hidden_BLH: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        known_BLH = self._first_VH[torch.from_numpy(tokens[:, :-1])]
        return known_BLH + self._cross((hidden_BLH - known_BLH) @ self._basis_HK) @ self._basis_HK.t()

    def back(self, gradient_BLH: torch.Tensor) -> torch.Tensor:
        return self._cross(gradient_BLH @ self._basis_HK) @ self._basis_HK.t()
