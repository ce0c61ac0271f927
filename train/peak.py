"""What the device can do at best, which the model FLOPs utilization (MFU) is a share of."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import torch

from train.hardware import HARDWARE

SLOWER = {"pcie", "nvl", "laptop", "mig"}  # words in the names of GPUs that are less than the one that is listed
SECONDS = 0.3
SIDE = {"cpu": 1024, "cuda": 8192}


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s in products of `dtype`, and where the figure is from: the maker's for a listed GPU, or measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if listed := listed_as(name):
            return HARDWARE[listed].peak_flops, f"the maker's for {name}"
    return measure_peak(device, dtype), "measured"


def listed_as(name: str) -> str | None:
    """The key in `HARDWARE` of a GPU that calls itself `name`, such as "NVIDIA A100-SXM4-80GB"."""
    words = re.findall("[a-z0-9]+", name.lower())
    if SLOWER & {*words}:
        return None
    known = [*words, *(first + second for first, second in pairwise(words))]  # "RTX 4090" too
    return next((word for word in known if word in HARDWARE), None)


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
