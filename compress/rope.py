"""Rotary position tables, with the scalings of long-context checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import CheckpointError, Floats

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def tables(rope: Mapping[str, Any], head_size: int, max_position: int, length: int) -> tuple[Floats, Floats]:
    """cos and sin, each [length, head_size / 2], both times the scaling's attention factor."""
    if rope["rope_type"] not in ROPE_TYPES:
        raise CheckpointError(
            f"rope_type {rope['rope_type']!r} is not supported. Supported are {', '.join(ROPE_TYPES)}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0.")
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_size, 2) / head_size)  # [head_size / 2]
    attention_factor = 1.0
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        frequencies = _llama3(frequencies, rope, max_position)
    elif rope["rope_type"] == "yarn":
        frequencies, attention_factor = _yarn(frequencies, rope, head_size, max_position)
    # transformers multiplies in float32, which at far positions is a visible rounding: do as it does.
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies.astype(np.float32))
    scale = np.float32(attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _llama3(frequencies: NDArray[np.float64], rope: Mapping[str, Any], max_position: int) -> NDArray[np.float64]:
    """Divide the low frequencies by the factor, keep the high ones, blend between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope.get("original_max_position_embeddings", max_position)
    turns = original * frequencies / (2 * math.pi)  # in the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: NDArray[np.float64] = (1 - kept) * frequencies / rope["factor"] + kept * frequencies
    return scaled


def _yarn(
    frequencies: NDArray[np.float64], rope: Mapping[str, Any], head_size: int, max_position: int
) -> tuple[NDArray[np.float64], float]:
    """Interpolate the dimensions that turn seldom, keep those that turn often (arXiv:2309.00071)."""
    original = rope.get("original_max_position_embeddings") or max_position
    factor = rope.get("factor") or max_position / original

    def dimension(turns: float) -> float:
        return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    high += 0.001 if low == high else 0  # no division by zero
    interpolated = np.clip((np.arange(head_size // 2) - low) / (high - low), 0.0, 1.0)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        ours, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = magnitude(ours) / magnitude(all_dim) if ours and all_dim else magnitude(1.0)
    return frequencies / factor * interpolated + frequencies * (1 - interpolated), attention_factor
