"""Whether a container's arguments are understood, asked of the programs' own parsers."""

from __future__ import annotations

import contextlib
import io
from functools import cache
from typing import Any

from serve.settings import Settings, parse_settings

SERVER = "server"  # the container's name; its image may be called anything
TORCHRUN = "torch.distributed.run"


def options_of(container: dict[str, Any]) -> Settings | None:
    """The server's settings; None if the container is not the server. Raises ValueError for flags that it lacks."""
    if container["name"] != SERVER:
        return None
    settings: Settings = parsed(tuple(container["args"]))
    return settings


def problem_of(container: dict[str, Any]) -> str:
    """Why the arguments are not understood, "" if they are."""
    try:
        if options_of(container) is None:
            parsed(tuple(container["args"]), server=False)
    except ValueError as error:
        return str(error)
    return ""


@cache
def parsed(arguments: tuple[str, ...], server: bool = True) -> Any:
    """Raises ValueError with what the program would say."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_settings(list(arguments)) if server else parse_module(list(arguments))
    except SystemExit as end:
        raise ValueError(" ".join(said.getvalue().split())) from end


def parse_module(arguments: list[str]) -> Any:
    """`MODULE ARGUMENTS` as the train image runs it; of torchrun, which has its own flags, what it starts."""
    from deploy.__main__ import parser as deploy_parser
    from train.__main__ import parser as train_parser

    module, *rest = arguments
    if module == TORCHRUN:
        at = rest.index("-m")
        module, *rest = rest[at + 1 :]
    parsers = {"deploy": deploy_parser, "train": train_parser}
    if module not in parsers:
        raise ValueError(f"there is no program {module}")
    return parsers[module](rest[0]).parse_args(rest)
