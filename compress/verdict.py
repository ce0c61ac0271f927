"""Whether an artifact may be published: what the gate cannot run or does not pass is refused, or recorded as such."""

from __future__ import annotations

import math

from compress.budget import Budget
from compress.gate import Evidence, judge
from compress.precisions import float_type
from compress.summary import limited_figures
from proto.manifest import Form, GateReport, Recipe
from serve.device_stream import HOST, Device


class GateFailed(Exception):
    """The artifact is worse than the thresholds allow, or cannot be judged; nothing was published."""


def can_judge(recipe: Recipe, device: Device, *, ungated: bool) -> bool:
    """Whether the gate can run the recipe on the device. Raises GateFailed where it cannot, unless that is accepted."""
    floats = float_type(recipe.default)
    if floats != "bf16" or device != HOST:
        return True
    if not ungated:
        raise GateFailed(
            f"recipe {recipe.name} cannot be judged: ONNX Runtime has no {floats} kernels on the CPU. Give "
            "--gate-device cuda where there is a GPU, or recipe fp16, or --ungated, which publishes it without a "
            "verdict and records that"
        )
    return False


def pass_judgement(evidence: Evidence[Form], budget: Budget, *, forced: bool) -> GateReport:
    """Raises GateFailed for figures beyond the budget, unless forced, and for those that are no numbers."""
    gate = judge(evidence, budget, forced=forced)
    if bad := [name for name, value in gate.metrics.items() if not math.isfinite(value)]:
        raise GateFailed(f"{bad[0]} is not a number, so nothing was published: the weights or the graph are broken")
    if not gate.passed and not forced:
        found = limited_figures(gate)
        raise GateFailed(f"the gate failed and nothing was published: {found}; --force publishes anyway")
    return gate
