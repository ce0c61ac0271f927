"""Functional correctness: generated Python is run against checks, in the sandbox. pass@k after Chen et al. (2021)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from train.evaluation.intervals import mean_interval
from train.evaluation.judgement import Judgement
from train.evaluation.options import Options
from train.evaluation.sandbox import Limits, Outcome, level, run_checks
from train.evaluation.targets import Prompt, Sampling, Target
from train.evaluation.task_files import Example, prompt_of

INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}```"
KS = (1, 10, 100)
BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def judge(target: Target, examples: Sequence[Example], options: Options) -> Judgement:
    """Raises TrainError where no sandbox can be made."""
    isolation = level()  # before the long work
    prompts = [_prompt(example, chat=options.chat) for example in examples for _ in range(options.samples)]
    answers = target.generate(prompts, Sampling(options.max_tokens, options.temperature, options.seed, options.stop))
    pairs = [(examples[number // options.samples], answer) for number, answer in enumerate(answers)]
    limits = Limits(options.code_seconds, memory_bytes=options.code_memory_mib << 20)

    def run(pair: tuple[Example, str]) -> Outcome:
        example, answer = pair
        program = program_of(example["prompt"], example["entry_point"], answer)
        return run_checks(program, example["entry_point"], example["check"], limits)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads only wait: the work is in processes
        outcomes = list(tqdm(pool.map(run, pairs), total=len(pairs), desc="running", unit="program", disable=None))
    n = options.samples
    passed = [sum(outcome.passed for outcome in outcomes[start : start + n]) for start in range(0, len(outcomes), n)]
    metrics, intervals = {}, {}
    for k in sorted({k for k in (*KS, n) if k <= n}):
        values = [pass_at(k, n, count) for count in passed]
        metrics[f"pass@{k}"] = sum(values) / len(values)
        intervals[f"pass@{k}"] = mean_interval(values, seed=options.seed)
    verdicts = [outcome.verdict for outcome in outcomes]
    return Judgement(
        metrics,
        intervals,
        counts={"programs": len(pairs)} | {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
        answers=[
            {"entry_point": example["entry_point"], "answer": answer, "verdict": outcome.verdict, "why": outcome.detail}
            for (example, answer), outcome in zip(pairs, outcomes, strict=True)
        ],
        notes={"sandbox": isolation},
    )


def pass_at(k: int, num_samples: int, num_passed: int) -> float:
    """The chance that one of k passes, drawn from `num_samples` of which `num_passed` do: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def program_of(prompt: str, entry_point: str, answer: str) -> str:
    """The program in an answer.

    The first code block that defines the function, or the whole answer if that does, after what the prompt says before
    the function (imports, helpers). Else the answer goes on where the prompt, which is code, stopped: up to the first
    line that is not of the function's body any more. If the prompt is no code, the first block.
    """
    definition = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    begun = definition.search(prompt)
    before = prompt[: begun.start()] if begun else ""
    blocks: list[str] = BLOCK.findall(answer)
    whole = next((code for code in [*blocks, answer] if definition.search(code)), None)
    if whole is not None:
        return before + "\n" + whole
    if blocks and not begun:
        return blocks[0]
    return prompt + _body(blocks[0] if blocks else answer)


def _body(answer: str) -> str:
    lines = answer.split("\n")
    for number, line in enumerate(lines[1:], start=1):
        if line.strip() and not line[0].isspace():
            return "\n".join(lines[:number])
    return answer


def _prompt(example: Example, *, chat: bool) -> Prompt:
    """In chat, a prompt that is the beginning of the function is put into an instruction."""
    if chat and re.search(rf"^def {re.escape(example['entry_point'])}\b", example["prompt"], re.MULTILINE):
        return [{"role": "user", "content": INSTRUCTION.format(example["prompt"])}]
    return prompt_of(example, chat=chat)
