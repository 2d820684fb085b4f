"""What is really allocated: every tensor's memory counted while it lives, wherever it is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Memory of ``tensors``, shared memory once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """``peak``: the most that lived at once of what was made within; set it to 0 to begin anew."""

    def __init__(self) -> None:
        super().__init__()
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._living:
                    self._living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._at_most += storage.nbytes()
        if self._at_most > self.peak:  # only then can this be a new peak
            self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        self._living = {key: entry for key, entry in self._living.items() if not entry[0].expired()}
        self._at_most = sum(size for _, size in self._living.values())
        return self._at_most
