"""Windows of text as the batches of the training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from train.batch import IGNORE, Batch


class WindowBatches:
    """Batch number N: `size` of the windows, all of one length, in an order that changes from epoch to epoch."""

    def __init__(self, windows: Sequence[Sequence[int]], size: int) -> None:
        self._windows = np.asarray(windows, np.int64)
        self._size = min(size, len(windows))
        self.steps_per_epoch = len(windows) // self._size
        self.digest = hashlib.sha256(self._windows.tobytes()).hexdigest()

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Rows part, part + parts, ... of batch `step`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng(epoch).permutation(len(self._windows))
        rows = order[place * self._size : (place + 1) * self._size][part::parts]
        tokens = torch.from_numpy(self._windows[rows])
        labels = torch.full_like(tokens, IGNORE)
        labels[:, :-1] = tokens[:, 1:]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return Batch(tokens, positions, labels, num_tokens=tokens.numel())
