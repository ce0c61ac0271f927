"""Where the text of a record is: in these columns, whichever of them it has. The others are only carried along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TEXT_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected")
_WITHIN = ("content", "text")  # of a message, and of a part of a message's content


def texts_of(columns: dict[str, Any], *, system: bool = True) -> list[str]:
    """All texts in the order of the columns; `system`: those of the messages with that role too."""
    found: list[str] = []
    for name in TEXT_COLUMNS:
        if name in columns:
            _change(columns[name], found.append, system)
    return found


def text_of(columns: dict[str, Any]) -> str:
    """What is judged and compared: the texts, with an empty line between them."""
    return "\n\n".join(text for text in texts_of(columns) if text)


def with_texts(columns: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The record with `change` done to each text."""
    return {name: _change(value, change) if name in TEXT_COLUMNS else value for name, value in columns.items()}


def _change(value: Any, change: Callable[[str], Any], system: bool = True) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_change(item, change, system) for item in value]
    if isinstance(value, dict) and (system or value.get("role") != "system"):
        return {name: _change(item, change, system) if name in _WITHIN else item for name, item in value.items()}
    return value
