"""The model that is learnt from: frozen, in as few bits as one likes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer

from train.errors import TrainError
from train.model import Model, load_model

Precision = Literal["float32", "bfloat16", "int8", "nf4"]


def load_teacher(
    checkpoint: Path, student: Path, precision: Precision = "bfloat16", *, attention: str = "sdpa"
) -> Model:
    """The checkpoint without dropout and gradients; int8 and nf4 are of its blocks, the rest is then bfloat16.

    Raises TrainError if it is no checkpoint, or its tokens are not those of the checkpoint `student`.
    """
    if precision not in get_args(Precision):
        raise TrainError(f"precision {precision!r} is unknown; give one of {', '.join(get_args(Precision))}")
    check_tokens(checkpoint, student)
    teacher = load_model(
        checkpoint,
        dtype=torch.float32 if precision == "float32" else torch.bfloat16,
        attention=attention,
        quantization=precision if precision == "int8" or precision == "nf4" else None,
    )
    return teacher.requires_grad_(False).eval()


def check_tokens(teacher: Path, student: Path) -> None:
    """Raises TrainError unless both tokenizers give every token the same number."""
    vocabularies = []
    for checkpoint in (teacher, student):
        path = checkpoint / "tokenizer.json"
        if not path.is_file():
            raise TrainError(f"{checkpoint} has no tokenizer.json; save it with a fast tokenizer")
        vocabularies.append(Tokenizer.from_file(str(path)).get_vocab())
    first, second = vocabularies
    if first != second:
        shared = len(first.items() & second.items())
        raise TrainError(
            f"only {shared} tokens have the same number in the teacher {teacher} ({len(first)} tokens) and in "
            f"{student} ({len(second)}); distillation on logits needs a teacher with the student's tokenizer"
        )
