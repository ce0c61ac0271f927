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


def add_flags(parser: argparse.ArgumentParser, kind: type, prefix: str = "") -> None:
    """A flag `--PREFIXfield-name` for each field of `kind`; `positional` ones without dashes."""
    for item in fields(kind):
        name, parse, text = prefix + item.name, item.metadata["parse"], item.metadata["help"]
        if item.metadata.get("positional"):
            rest = {} if item.default is MISSING else {"nargs": "?", "default": item.default}
            parser.add_argument(name, type=parse, help=text, **rest)
        elif item.default is MISSING:
            parser.add_argument(*item.metadata.get("short", ()), flag(name), type=parse, required=True, help=text)
        elif parse is bool:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=item.default, help=text)
        else:
            many = isinstance(item.default, tuple)
            default = (" ".join(item.default) if many else str(item.default)).replace("%", "%%")
            parser.add_argument(
                flag(name),
                type=parse,
                default=item.default,
                choices=item.metadata["choices"],
                nargs="+" if many else None,
                help=text + (f" (default: {default})" if default and item.default is not None else ""),
            )


def from_flags(kind: type[T], args: argparse.Namespace, prefix: str = "") -> T:
    """The dataclass from parsed arguments. Raises TrainError that names flag, value and limit."""
    given: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        value = getattr(args, prefix + item.name)
        least, most = item.metadata.get("range", (-math.inf, math.inf))
        if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value <= most:
            limit = f"at least {least:g}" if value < least else f"at most {most:g}"
            raise TrainError(f"{flag(prefix + item.name)} {value:g} is out of range; give {limit}")
        given[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)
