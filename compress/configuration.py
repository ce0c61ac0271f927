"""What configurations say in more than one way: windows, rotary embeddings, the tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Windows = Literal["never", "every layer", "switched", "by layer"]


def window_of(windows: Windows, config: Mapping[str, Any], layer: int) -> int | None:
    """Keys that a query of this layer sees, itself included; None: all."""
    window: int | None = config.get("sliding_window", 4096)  # transformers' value where the key is absent
    if windows == "every layer":
        return window
    if windows == "never" or (windows == "switched" and not config.get("use_sliding_window")):
        return None
    if layer_types := config.get("layer_types"):
        return window if layer_types[layer] == "sliding_attention" else None
    if windows == "by layer":
        return window if (layer + 1) % config.get("sliding_window_pattern", 6) else None
    return window if layer >= config.get("max_window_layers", 0) else None


def ropes_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of layers that see all, and of those with a window where they have their own.

    transformers 5 writes `rope_parameters`; before it, `rope_theta`, `rope_scaling` (with `type`) and
    `rope_local_base_freq`.
    """
    settings = config.get("rope_parameters") or {}
    if "full_attention" in settings:
        return _rope(settings["full_attention"], config), _rope(settings["sliding_attention"], config)
    rope = _rope(settings or config.get("rope_scaling") or {}, config)
    local = config.get("rope_local_base_freq")
    return rope, {} if local is None else {"rope_theta": local, "rope_type": "default"}


def _rope(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **settings}
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def eos_of(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Chat models name their end-of-turn token in the generation config alone: take both."""
    found: dict[int, None] = {}
    for source in (config, generation):
        value = source.get("eos_token_id")
        found |= dict.fromkeys(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(found)
