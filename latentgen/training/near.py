"""Rows of an array where a step needs them: a GPU takes them from its own memory, where there is room for all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHARE = 8  # an array may take this part of a GPU's free memory: 1/8


class Near:
    """An array (N, ...) of a training set, whose rows are taken by number."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._held: dict[torch.device, Tensor | None] = {}

    def take(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """The rows (len(rows), ...) on a device, in the array's own type."""
        if device.type == "cuda" and (held := self._on(device)) is not None:
            return held[torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(device)]
        return torch.from_numpy(self.array[rows]).to(device)

    def _on(self, device: torch.device) -> Tensor | None:
        if device not in self._held:
            room = torch.cuda.mem_get_info(device)[0] // SHARE
            fits = self.array.nbytes <= room
            self._held[device] = torch.from_numpy(np.array(self.array)).to(device) if fits else None
        return self._held[device]
