"""Every setting of `python -m train run` that is not one part's own, with its default and its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from train.flags import option
from train.samples import TooLong
from train.schedule import SCHEDULES
from train.teacher import Precision

ADAPTERS = ("none", "lora", "qlora")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    checkpoint: Path = field(
        metadata={"help": "Hugging Face directory to start from", "parse": Path, "positional": True}
    )
    data: tuple[Path, ...] = option((), "files and folders to learn from")
    held_out: tuple[Path, ...] = option((), "files and folders to judge by, never learnt from")
    output: Path = field(metadata={"help": "folder of the run", "parse": Path, "short": ("-o",)})
    objective: str = option("next-token", "what to learn; see Objectives")
    shape: str = option("", "of the data, if the objective takes several: text or chat")
    too_long: TooLong = option("skip", "a sample longer than the context, except text", choices=("skip", "cut"))
    teacher: str = option("", "checkpoint to learn from, for distill")
    teacher_precision: Precision = option("bfloat16", "of the teacher", choices=("float32", "bfloat16", "int8", "nf4"))
    adapter: str = option("none", "train low-rank adapters and not the model itself", choices=ADAPTERS)
    context: int = option(0, "tokens in a row; 0: what the model allows, at most 1024", least=0)
    batch: int = option(8, "rows, or examples, in a step, over all processes", least=1)
    micro_batch: int = option(0, "rows computed at once in a process; 0: its whole share of the batch", least=0)
    steps: int = option(0, "optimizer steps; 0: as --epochs says", least=0)
    epochs: float = option(1.0, "passes over the data", least=0)
    learning_rate: float = option(0.0, "peak learning rate; 0: by objective and adapter", least=0)
    schedule: str = option("cosine", "learning rate over the run", choices=SCHEDULES)
    warmup: float = option(0.03, "share of the run in which the learning rate rises", least=0, most=1)
    decay: float = option(0.2, "share of the run in which it falls, for wsd", least=0, most=1)
    clip: float = option(1.0, "largest norm of the gradients", least=0)
    precision: str = option("auto", "of the products; auto: bfloat16 where the processor has it", choices=PRECISIONS)
    compile: bool = option(False, "compile the layers with torch.compile")
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass to save memory")
    eval_every: int = option(0, "steps between judgements by the held-out data; 0: ten in a run", least=0)
    eval_rows: int = option(32, "rows, or examples, of the held-out data in a judgement", least=1)
    seed: int = option(0, "of the order of the data and of dropout", least=0)
    cache: str = option("", "folder for tokenized data (default: the run's own)")
