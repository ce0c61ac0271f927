"""Functional correctness: programs out of answers, pass@k, and our own tasks."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.train.evaluation.fake_target import FakeTarget
from train.evaluation.command import functions
from train.evaluation.functions import INSTRUCTION, judge, pass_at, program_of
from train.evaluation.options import Options
from train.evaluation.sandbox import run_checks
from train.evaluation.task_files import read

TASKS = Path(functions.__file__).parent / "tasks" / "python_functions.jsonl"
PROMPT = 'import math\n\n\ndef f(x):\n    """Return twice x."""\n'
EXAMPLE = {"prompt": PROMPT, "entry_point": "f", "check": "assert f(2) == 4\nassert f(3) == 6\n"}
WHOLE = "def f(x):\n    return int(math.prod([x, 2]))\n"


@pytest.mark.parametrize(
    "answer",
    [
        "    return 2 * x\n",
        "    return 2 * x\n\n\ndef g(x):\n    return f(x) + unknown\n\n\nprint(unknown)",
        "    y = x\n\n    return y + x\nSo this doubles it.",
        "```python\n    return 2 * x\n```",
        f"Here you are:\n\n```python\n{WHOLE}```\n\nIt doubles x.",
        f"First a test:\n```python\nassert f(1) == 2\n```\nthen\n```\n{WHOLE}```",
        f"```python\n{WHOLE}",
        WHOLE,
        f"{PROMPT}    return x + x",
    ],
)
def test_the_program_is_found_in_the_answer(answer: str) -> None:
    assert run_checks(program_of(PROMPT, "f", answer), "f", EXAMPLE["check"]).passed


def test_a_prompt_that_is_no_code_takes_the_first_block() -> None:
    assert program_of("Write f.", "f", "Sure:\n```py\nf = abs\n```") == "f = abs\n"
    assert program_of("Write f.", "f", "Sure:\ndef f(x): return x") == "\nSure:\ndef f(x): return x"


@pytest.mark.parametrize(("n", "passed"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (6, 3)])
def test_pass_at_k_is_the_share_of_draws_with_one_that_passes(n: int, passed: int) -> None:
    outcomes = [True] * passed + [False] * (n - passed)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at(k, n, passed) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_samples_of_a_task_stand_together() -> None:
    # Half of the four samples of the first task pass, and none of the second.
    answers = iter(["    return 2 * x", "    return x", "    return x + x", "    oh", *["    return 0"] * 4])
    target = FakeTarget(lambda prompt: next(answers))
    found = judge(target, [EXAMPLE, EXAMPLE], Options(samples=4, temperature=0.8))
    assert found.metrics == {"pass@1": 0.25, "pass@4": 0.5}
    assert found.intervals["pass@1"] == (0, 0.5)
    assert found.counts == {"programs": 8, "failed": 6, "passed": 2}
    assert target.prompts == [PROMPT] * 8
    assert [answer["verdict"] for answer in found.answers[:2]] == ["passed", "failed"]


def test_in_chat_a_prompt_of_code_is_put_into_an_instruction() -> None:
    target = FakeTarget(lambda prompt: f"```python\n{WHOLE}```")
    plain = {"prompt": "Write a function f.", "entry_point": "f", "check": "assert f(2) == 4"}
    assert judge(target, [EXAMPLE, plain], Options(chat=True)).counts["passed"] == 1  # plain has no import
    contents = [prompt[0]["content"] for prompt in target.prompts]  # type: ignore[index]
    assert contents == [INSTRUCTION.format(PROMPT), "Write a function f."]


def our_tasks() -> list[dict[str, Any]]:
    return read(TASKS, "functions", 0).examples


def test_each_of_our_tasks_is_solved_by_its_solution_and_by_no_empty_one() -> None:
    examples = our_tasks()
    assert len(examples) >= 40
    assert all(example["solution"].startswith(example["prompt"]) for example in examples)
    programs = [(e["solution"], e["entry_point"], e["check"]) for e in examples]
    programs += [(e["prompt"] + "    return None\n", e["entry_point"], e["check"]) for e in examples]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda program: run_checks(*program), programs))
    solved, empty = outcomes[: len(examples)], outcomes[len(examples) :]
    assert [e["entry_point"] for e, outcome in zip(examples, solved, strict=True) if not outcome.passed] == []
    assert [e["entry_point"] for e, outcome in zip(examples, empty, strict=True) if outcome.passed] == []


def test_our_tasks_have_names_of_their_own_and_their_prompts_tell_no_solution() -> None:
    examples = our_tasks()
    assert len({example["entry_point"] for example in examples}) == len(examples)
    for example in examples:
        body = example["solution"].removeprefix(example["prompt"])
        assert body.strip()
        assert json.dumps(body)[1:-1] not in example["prompt"]
