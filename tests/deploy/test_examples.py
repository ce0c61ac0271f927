"""What is learnt from and what is judged by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import DeployError
from deploy.examples import FRESH, JUDGE, LEARN, mix, prompt_key, read_lines, split


def write(path: Path, numbers: range, word: str = "yes") -> Path:
    path.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{word} {n}"}) + "\n" for n in numbers))
    return path


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@given(st.lists(st.integers(0, 30), max_size=40), st.floats(0.01, 0.99))
def test_a_question_is_on_one_side_only(numbers: list[int], share: float) -> None:
    given = [json.dumps({"prompt": str(n), "completion": str(i)}) for i, n in enumerate(numbers)]
    learnt, judged = split(given, share)
    assert sorted(learnt + judged) == sorted(given)
    assert not {prompt_key(json.loads(line)) for line in learnt} & {prompt_key(json.loads(line)) for line in judged}
    assert split(given[:5], share) == tuple([line for line in side if line in given[:5]] for side in (learnt, judged))


def test_all_spellings_of_a_question_are_one() -> None:
    chat = [{"role": "user", "content": "Why?"}]
    said = {"role": "assistant", "content": "So."}
    shapes = [
        {"messages": [*chat, said]},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": chat, "chosen": "So.", "rejected": "No."},
        {"chosen": [*chat, said], "rejected": [*chat, said]},
        {"prompt": chat, "completion": "So.", "label": True},
    ]
    assert len({prompt_key(example) for example in shapes}) == 1


def test_earlier_examples_are_mixed_in_but_none_that_is_judged_by(tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", range(100))
    old = write(tmp_path / "old.jsonl", range(50, 300), "no")
    counts = mix(new, [old, old], tmp_path, judged_share=0.2, replay_share=0.5, salt="1")
    fresh, judged, learnt = (lines(tmp_path / name) for name in (FRESH, JUDGE, LEARN))
    assert (len(fresh), len(judged), len(learnt) - len(fresh)) == (counts.fresh, counts.judged, counts.earlier)
    assert counts.fresh + counts.judged == 100
    assert counts.earlier == counts.fresh  # half of what is learnt
    assert learnt[: len(fresh)] == fresh
    assert set(learnt[len(fresh) :]) <= set(lines(old))
    assert not {prompt_key(json.loads(x)) for x in learnt} & {prompt_key(json.loads(x)) for x in judged}
    again = tmp_path / "again"
    again.mkdir()
    mix(new, [old], again, judged_share=0.2, replay_share=0.5, salt="1")
    assert lines(again / LEARN) == learnt
    mix(new, [old], again, judged_share=0.2, replay_share=0.5, salt="2")
    assert lines(again / LEARN)[len(fresh) :] != learnt[len(fresh) :]


def test_too_little_on_one_side_is_said(tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", range(1))
    with pytest.raises(DeployError, match=r"1 can be learnt from and 0 judged by|0 can be learnt from and 1 judged by"):
        mix(new, [], tmp_path, judged_share=0.2, replay_share=0.5, salt="1")


@pytest.mark.parametrize("bad", ["{", "[1]", "3"])
def test_a_line_that_is_no_example_is_named(bad: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n\n' + bad + "\n")
    with pytest.raises(DeployError, match=r"x.jsonl, example 2 is no JSON object"):
        read_lines(tmp_path / "x.jsonl")
