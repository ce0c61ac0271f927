"""Every setting of the server, its default and its help, written once; the command line is derived from it."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from proto.redaction import KINDS
from serve.slo import Objectives

PRESIDIO = "presidio"
DEVICES = re.compile(r"cpu|cuda(:\d+(,\d+)*)?")
NONE = "none"


def parse_device(text: str) -> str:
    """Check the value of `--device`."""
    if not DEVICES.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu, cuda, or cuda:0,1 for these GPUs")
    return text


def parse_kinds(text: str) -> str:
    """Check the value of `--redact`: kinds with commas between them, or `none`."""
    names, known = [name.strip() for name in text.split(",")], (*KINDS, PRESIDIO)
    for name in names:
        if name not in known and names != [NONE]:
            problem = f"{name!r} cannot be redacted; give {NONE}, or some of {', '.join(known)}"
            raise argparse.ArgumentTypeError(problem)
    return ",".join(names)


def setting(
    default: Any,
    help: str,
    parse: Any = None,
    *,
    least: float = 0,
    most: float = math.inf,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field that becomes the flag `--field-name`; a number must be from `least` to `most`."""
    limits = {"range": (least, most), "choices": choices}
    return field(default=default, metadata={"help": help, "parse": parse or type(default), **limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    model: Path | None = field(
        default=None, metadata={"help": "artifact directory to serve; either this or --registry", "parse": Path}
    )
    registry: Path | None = field(
        default=None,
        metadata={"help": "registry whose current version and candidate to serve and to follow", "parse": Path},
    )
    model_name: str = setting("", "name shown to clients (default: the manifest's)")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    http_port: int = setting(8000, "HTTP port; 0 picks a free one", most=65535)
    grpc_port: int = setting(50051, "gRPC port; 0 picks a free one", most=65535)
    threads: int = setting(0, "compute threads; 0: the CPU quota of this process")
    form: str = setting(
        "auto",
        "the graph to run: native operators, stock operators, or native if possible",
        choices=("auto", "native", "stock"),
    )
    device: str = setting(
        "cpu", "where to compute: cpu, cuda, or cuda:0,1, an engine on each of these GPUs", parse_device
    )
    slots: int = setting(0, "requests that run together; 0: as many as the KV budget holds, at most 32, on CUDA 256")
    kv_budget_mib: int = setting(
        0,
        "memory of the KV cache in MiB, with --registry half for each of two versions; 0: a quarter of free memory, at "
        "most 1024 for a version; on CUDA half of each GPU's",
    )
    max_context: int = setting(0, "tokens per request, prompt and completion; 0: the model's, at most 2048")
    prefill_chunk: int = setting(
        0, "prompt tokens computed in a step; 0: 512 natively and on CUDA, 128 with stock operators"
    )
    itl_limit: float = setting(
        2.0, "how many times longer prompts may make the steps of requests that decode; native form only", least=1
    )
    speculate: bool = setting(True, "draft tokens by prompt lookup, while that pays; native form only", parse=bool)
    max_queue: int = setting(64, "requests that may wait; more are refused with 503")
    request_timeout_seconds: float = setting(600.0, "a request older than this is ended", least=0.001)
    drain_seconds: float = setting(30.0, "on SIGTERM, how long in-flight requests may still run")
    slo_target: float = setting(
        Objectives.target, "share of the requests that are to be good, for each objective", least=0.5, most=0.99999
    )
    slo_ttft_seconds: float = setting(
        Objectives.ttft_seconds, "a request is good if its first token comes within this", least=0.001
    )
    slo_tpot_seconds: float = setting(
        Objectives.tpot_seconds, "a request is good if each further token takes this at most, on average", least=0.0001
    )
    body_limit_bytes: int = setting(4 << 20, "largest HTTP body or gRPC message", least=1)
    header_seconds: float = setting(10.0, "how long a client may take to send a request's headers", least=0.001)
    body_seconds: float = setting(60.0, "how long a client may take to send a request's body", least=0.001)
    max_connections: int = setting(1024, "open HTTP connections; more are closed at once", least=1)
    api_key: str = setting("", "bearer key required on all routes but /, /health, /ready; default: $PAWL_API_KEY")
    api_keys: Path | None = field(
        default=None,
        metadata={"help": "TOML file of API keys, each with a name, the key's SHA-256 and its scopes", "parse": Path},
    )
    log_format: str = setting("text", "lines for people, or one JSON object a line", choices=("text", "json"))
    records: str = setting("data/records.sqlite", "SQLite file or postgresql:// URL of interactions and feedback")
    log_content: bool = setting(True, "keep prompts and completions in the records", parse=bool)
    redact: str = setting(
        ",".join(KINDS), "what is taken out of records before they are written; none, or presidio too", parse_kinds
    )
    keep_content_days: int = setting(90, "days to keep the text of the records; 0: for ever")
    keep_metadata_days: int = setting(365, "days to keep the rest of the records; 0: for ever")
    derived: Path = field(
        default=Path("data"),
        metadata={"help": "where snapshots and datasets made from the records are; their text goes too", "parse": Path},
    )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """A flag for each of these settings."""
    for item in fields(Settings):
        if item.name not in names:
            continue
        parse, text = item.metadata["parse"], item.metadata["help"]
        if parse is bool:
            parser.add_argument(flag(item.name), action=argparse.BooleanOptionalAction, default=item.default, help=text)
        else:
            shown = "" if item.default in ("", None) else " (default: %(default)s)"
            choices = item.metadata.get("choices")
            parser.add_argument(flag(item.name), type=parse, default=item.default, choices=choices, help=text + shown)


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, and hold numbers to the settings' limits; exits with 2 and a message on a bad one."""
    args = parser.parse_args(argv)
    for item in fields(Settings):
        value, (least, most) = getattr(args, item.name, None), item.metadata.get("range", (0, 0))
        if (
            isinstance(value, int | float)
            and type(value) is not bool
            and not (least <= value <= most and math.isfinite(value))
        ):
            limit = f"{least} or more" if math.isinf(most) else f"from {least} to {most}"
            parser.error(f"argument {flag(item.name)}: {value} is out of range; give a number {limit}")
    return args


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Parse the command line of `python -m serve`."""
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="Serve a Pawl artifact over HTTP and gRPC.",
        epilog="`python -m serve records --help` shows what can be done with the records.",
    )
    add_flags(parser, *(item.name for item in fields(Settings)))
    args = parse_flags(parser, argv)
    if (args.model is None) == (args.registry is None):
        parser.error("give one of --model DIR and --registry ROOT")
    return Settings(**vars(args))
