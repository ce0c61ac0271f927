"""How a target is judged. The flags of `python -m train eval` are derived from these fields."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from train.errors import TrainError
from train.flags import flag

TASKS = ("perplexity", "generation", "classification", "functions")


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True)
class Options:
    """Raises TrainError for values that cannot be."""

    task: str = _option("auto", "what the files hold; auto: told by their columns", ("auto", *TASKS))
    limit: int = _option(0, "examples of each file, the first; 0: all")
    chat: bool = _option(False, "put each `prompt` into the chat template, as the user's message")
    max_tokens: int = _option(256, "tokens of an answer, at most")
    temperature: float = _option(0.0, "of the answers; 0: always the most probable token")
    stop: tuple[str, ...] = _option((), "texts that end an answer")
    seed: int = _option(0, "of sampled answers and of the resampling behind intervals")
    samples: int = _option(1, "answers to each prompt of `functions`, for pass@k")
    choose: str = _option(
        "answer", "how a choice is read: the first in the answer, or the most probable", ("answer", "likelihood")
    )
    window: int = _option(0, "tokens that a text is read by; 0: the target's context, at most 2048")
    stride: int = _option(0, "tokens by which the window moves on, of each of which it then foretells; 0: window - 1")
    batch: int = _option(8, "texts that a checkpoint takes at once, or requests that a server has at once")
    device: str = _option("auto", "where a checkpoint runs: cpu, cuda, cuda:1; auto: cuda if there is one")
    dtype: str = _option("float32", "a checkpoint's numbers; auto: as it is saved", ("float32", "bfloat16", "auto"))
    model: str = _option("", "a server's model; empty: the first that it lists")
    tokenizer: str = _option("", "directory with the server's tokenizer.json; empty: the server's /tokenize")
    key_variable: str = _option("PAWL_API_KEY", "environment variable with the server's key")
    code_seconds: int = _option(5, "CPU seconds of each generated program")
    code_memory_mib: int = _option(512, "address space of each generated program")
    lm_eval: tuple[str, ...] = _option((), "task files (YAML) for lm-evaluation-harness")

    def __post_init__(self) -> None:
        for name in ("limit", "window", "stride", "seed", "temperature"):
            if (value := getattr(self, name)) < 0:
                raise TrainError(f"{flag(name)} {value} is negative; give 0 or more")
        for name in ("max_tokens", "samples", "batch", "code_seconds", "code_memory_mib"):
            if (value := getattr(self, name)) < 1:
                raise TrainError(f"{flag(name)} {value} is too small; give 1 or more")
        if self.samples > 1 and self.temperature == 0:
            raise TrainError(f"--samples {self.samples} at --temperature 0 are all the same; give --temperature 0.8")
        if self.window == 1 or (self.window and self.stride >= self.window):
            raise TrainError(f"--window {self.window} must be above 1, and above --stride {self.stride}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    for item in fields(Options):
        text, default = item.metadata["help"], item.default
        if isinstance(default, bool):
            parser.add_argument(flag(item.name), action="store_true", help=text)
        elif isinstance(default, tuple):
            parser.add_argument(flag(item.name), nargs="+", default=default, help=text)
        else:
            shown = f"{text} (default: %(default)s)" if default != "" else text
            choices = item.metadata["choices"]
            parser.add_argument(flag(item.name), type=type(default), default=default, choices=choices, help=shown)
