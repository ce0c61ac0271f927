"""transformers.Trainer on the data of `bench.training`: writes [tokens of data, seconds] of each step."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

IGNORE = -100


class Rows(Dataset[dict[str, list[int]]]):
    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def group_texts(tokenizer: Any, records: Iterator[dict[str, Any]], context: int, wanted: int) -> Rows:
    """All documents in one stream, cut into rows of the context's length, as in transformers' run_clm example."""
    stream: list[int] = []
    while len(stream) < wanted * context:
        stream += [*tokenizer(next(records)["text"])["input_ids"], tokenizer.eos_token_id]
    rows = [stream[start : start + context] for start in range(0, wanted * context, context)]
    return Rows([{"input_ids": row, "labels": list(row)} for row in rows])


def conversations(tokenizer: Any, records: Iterator[dict[str, Any]], context: int, wanted: int) -> Rows:
    """One row each, the answer alone to be learnt; those over the context are left out, as ours leaves them out."""
    rows: list[dict[str, list[int]]] = []
    while len(rows) < wanted:
        messages = next(records)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        tokens = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        if len(tokens) <= context:
            labels = [IGNORE] * len(prompt) + tokens[len(prompt) :]
            rows.append({"input_ids": tokens, "labels": labels})
    return Rows(rows)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> int:
    top = argparse.ArgumentParser()
    top.add_argument("checkpoint", type=Path)
    top.add_argument("data", type=Path)
    top.add_argument("--case", choices=("pretrain", "finetune"), required=True)
    for name in ("context", "batch", "steps"):
        top.add_argument(f"--{name}", type=int, required=True)
    top.add_argument("--out", type=Path, required=True)
    args = top.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    make = group_texts if args.case == "pretrain" else conversations
    with args.data.open() as lines:
        rows = make(tokenizer, map(json.loads, lines), args.context, args.batch * args.steps)
    sizes: list[int] = []
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)

    def collate(examples: list[dict[str, list[int]]]) -> Any:
        sizes.append(sum(len(example["input_ids"]) for example in examples))
        return pad(examples)

    clock = Clock()
    settings = TrainingArguments(
        output_dir=str(args.out.parent / "trainer"),
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=True,
    )
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    args.out.write_text(json.dumps([list(step) for step in zip(sizes, seconds, strict=False)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
