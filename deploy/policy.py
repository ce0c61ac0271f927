"""The policy: what retraining and trials may do by themselves, and what a candidate must show."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from deploy.errors import DeployError
from deploy.quarantine import Limits
from train.flags import from_flags

DEFAULT = Path(__file__).parent / "policy.toml"

Share = Annotated[float, Meta(ge=0, le=1)]
Flags = dict[str, str | int | float | bool | list[str]]


class _Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Feedback(_Table, frozen=True):
    least_examples: Annotated[int, Meta(ge=2)]
    judged_share: Annotated[float, Meta(gt=0, lt=1)]
    replay_share: Annotated[float, Meta(ge=0, lt=1)]


class Gate(_Table, frozen=True):
    held_out_perplexity_ratio: Annotated[float, Meta(gt=0)]
    feedback_gain: Annotated[float, Meta(ge=0)]
    earlier_feedback_loss: Annotated[float, Meta(ge=0)]
    safety_regressions: Annotated[int, Meta(ge=0)]
    safety_tokens: Annotated[int, Meta(ge=1)]


class Trial(_Table, frozen=True):
    share: Share
    alpha: Annotated[float, Meta(gt=0, lt=1)]
    error_increase: Annotated[float, Meta(ge=0, le=1)]
    abort_increase: Annotated[float, Meta(ge=0, le=1)]
    ttft_ratio: Annotated[float, Meta(ge=1)]
    token_time_ratio: Annotated[float, Meta(ge=1)]
    approval_loss: Annotated[float, Meta(ge=-2, le=2)]
    settle_seconds: Annotated[float, Meta(ge=0)]
    longest_hours: Annotated[float, Meta(gt=0)]
    undecided: Literal["promote", "reject"]
    watch_hours: Annotated[float, Meta(ge=0)]


class Policy(_Table, frozen=True):
    """Every field must be in the file: what a cycle may do is never a default that nobody wrote down."""

    feedback: Feedback
    quarantine: Flags
    finetune: Flags
    quantize: Flags
    gate: Gate
    trial: Trial

    @property
    def limits(self) -> Limits:
        """Raises DeployError or TrainError for a limit that there is not or that is out of range."""
        default = {item.name: item.default for item in fields(Limits)}
        if unknown := self.quarantine.keys() - default.keys():
            raise DeployError(f"[quarantine] {sorted(unknown)[0]} is no limit; give some of {', '.join(default)}")
        return from_flags(Limits, Namespace(**default | self.quarantine))

    @property
    def shape(self) -> Literal["chat", "pairs", "thumbs"]:
        """Of the examples that the objective learns from. Raises DeployError if feedback makes none for it."""
        shapes: dict[object, Literal["chat", "pairs", "thumbs"]] = {"sft": "chat", "dpo": "pairs", "kto": "thumbs"}
        objective = self.finetune.get("objective")
        if objective not in shapes:
            names = ", ".join(map(str, shapes))
            raise DeployError(f"[finetune] objective = {objective!r}: feedback makes examples for {names}")
        return shapes[objective]


def read_policy(path: Path) -> Policy:
    """Raises DeployError that names the field."""
    try:
        policy = msgspec.toml.decode(path.read_bytes(), type=Policy)
    except msgspec.DecodeError as error:
        raise DeployError(f"{path}: {error}; compare {DEFAULT.name} in deploy/") from error
    _ = policy.shape, policy.limits  # so that what is wrong with them is told before anything is done
    return policy


def command_line(flags: Flags) -> list[str]:
    """A table of flags as arguments: `epochs = 2.0` is `--epochs 2.0`, true `--name`, false `--no-name`."""
    words: list[str] = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words
