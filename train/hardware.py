"""Named hardware to plan for. Peaks are the makers' for dense bfloat16 products with float32 sums."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. `memory` is what its driver shows, in bytes; `bandwidth` bytes/s; `price` dollars an hour.

    `mfu` is a share of the peak that training usually reaches.
    """

    peak_flops: float
    memory: float
    bandwidth: float
    price: float
    mfu: float = 0.4


# Prices are what clouds that rent single GPUs asked around the end of 2025, rounded: typical, and they move.
HARDWARE = {
    "a100": Hardware(312e12, 80.0 * GIB, 2.04e12, 1.60),  # SXM, 80 GB
    "h100": Hardware(989e12, 79.6 * GIB, 3.35e12, 2.50),  # SXM
    "h200": Hardware(989e12, 140.4 * GIB, 4.80e12, 3.30),
    "b200": Hardware(2250e12, 179.1 * GIB, 7.70e12, 5.00),
    "l4": Hardware(121e12, 22.5 * GIB, 0.30e12, 0.70),
    "l40s": Hardware(362e12, 45.0 * GIB, 0.864e12, 1.00),
    "rtx4090": Hardware(165e12, 24.0 * GIB, 1.01e12, 0.40),
    # Two cores with AMX: 1,024 multiplications a cycle each, at 2 GHz. Our own runs reach 615 tokens/s with 135M.
    "cpu2": Hardware(8e12, 16.0 * GIB, 0.02e12, 0.10, mfu=0.06),
}
