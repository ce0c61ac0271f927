"""What the device can do at best, which the model FLOPs utilization (MFU) is a share of."""

from __future__ import annotations

import time

import torch

SECONDS = 0.3
SIDE = {"cpu": 1024, "cuda": 8192}


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products of `dtype`. Takes about SECONDS, and one product at least."""
    side = SIDE.get(device.type, SIDE["cpu"])
    left = torch.randn(side, side, device=device).to(dtype)
    result = torch.empty_like(left)
    fastest = float("inf")
    deadline = time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < deadline or fastest == float("inf"):
        torch.mm(left, left, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest
