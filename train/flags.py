"""Settings written once: fields of frozen dataclasses, from which the command line is derived."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, TypeVar

from train.errors import TrainError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    parse: Any = None,
    choices: tuple[str, ...] | None = None,
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """A dataclass field that becomes `--field-name`. A number must be from `least` to `most`; a tuple takes many."""
    kind = parse or (Path if default == () else type(default[0] if isinstance(default, tuple) else default))
    return field(default=default, metadata={"help": help, "parse": kind, "choices": choices, "range": (least, most)})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, *kinds: type) -> None:
    for kind in kinds:
        for item in fields(kind):
            parse, text = item.metadata["parse"], item.metadata["help"]
            if item.default is MISSING and item.name == "checkpoint":
                parser.add_argument(item.name, type=parse, help=text)
            elif parse is bool:
                parser.add_argument(
                    flag(item.name), action=argparse.BooleanOptionalAction, default=item.default, help=text
                )
            elif isinstance(item.default, tuple):
                shown = f" (default: {' '.join(item.default)})" if item.default else ""
                parser.add_argument(
                    flag(item.name),
                    type=parse,
                    nargs="+",
                    default=item.default,
                    choices=item.metadata["choices"],
                    help=text + shown,
                )
            elif item.default is MISSING or item.default is None:
                parser.add_argument(flag(item.name), type=parse, required=item.default is MISSING, help=text)
            else:
                shown = "" if item.default == "" else " (default: %(default)s)"
                parser.add_argument(
                    flag(item.name),
                    type=parse,
                    default=item.default,
                    choices=item.metadata["choices"],
                    help=text + shown,
                )


def from_flags(kind: type[T], args: argparse.Namespace) -> T:
    """The dataclass from parsed arguments. Raises TrainError that names flag, value and limit."""
    given: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        value = getattr(args, item.name)
        least, most = item.metadata["range"]
        if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value <= most:
            limit = f"at least {least:g}" if value < least else f"at most {most:g}"
            raise TrainError(f"{flag(item.name)} {value:g} is out of range; give {limit}")
        given[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)
