"""Which steps are taken and which are left out, so that one bad batch does not end a run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.errors import TrainError
from train.flags import option


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """A gradient norm is a spike when it is over `spike_factor` times the median of the last `spike_window` taken.

    Ordinary batches differ by a factor of two or three, small ones by five, and clipping deals with those; what ruins
    moments for hundreds of steps is larger. The median ignores the few outliers that it lets through. The first steps
    of a fresh model have the largest norms, so little history is enough to start with.
    """

    spike_factor: float = option(10.0, "a gradient norm so many times the median is a spike, and left out", least=1)
    spike_window: int = option(128, "steps that the median is of", least=1)
    spike_warmup: int = option(16, "steps before the first can be a spike", least=1)
    max_rejected: int = option(10, "steps left out in succession before the run stops", least=1)


class Guard:
    """A function of the losses and norms that it was shown, so equal in all processes that are shown the same."""

    def __init__(self, options: GuardOptions) -> None:
        self.options = options
        self.rejected = 0  # in all
        self._in_succession = 0
        self._norms: deque[float] = deque(maxlen=self.options.spike_window)

    def accepts(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether to take the step. `grad_norm` is the one before clipping.

        Raises TrainError after `max_rejected` rejections in succession.
        """
        reason = self._reason(loss, grad_norm)
        if not reason:
            self._norms.append(grad_norm)
            self._in_succession = 0
            return True
        self.rejected += 1
        self._in_succession += 1
        if self._in_succession >= self.options.max_rejected:
            raise TrainError(
                f"step {step}: {reason} (loss {loss:g}, gradient norm {grad_norm:g}); {self._in_succession} steps in "
                "succession were left out: lower the learning rate, look at the data of these steps, and resume from "
                "the last checkpoint"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"rejected": self.rejected, "in_succession": self._in_succession, "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rejected = state["rejected"]
        self._in_succession = state["in_succession"]
        self._norms = deque(state["norms"], maxlen=self.options.spike_window)

    def _reason(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(grad_norm):
            return "the gradient norm is not finite"
        if len(self._norms) < self.options.spike_warmup:
            return ""
        median = statistics.median(self._norms)
        if median > 0 and grad_norm > self.options.spike_factor * median:
            return f"the gradient norm is {grad_norm / median:.0f} times the median of the last {len(self._norms)}"
        return ""
