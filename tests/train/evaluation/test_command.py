"""`python -m train eval`: options, what is judged by what, the report, the table."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.train.evaluation.fake_server import FakeServer
from tests.train.evaluation.fake_target import FakeClassifier, FakeTarget
from train.errors import TrainError
from train.evaluation.command import evaluate, table
from train.evaluation.options import Options, add_flags
from train.evaluation.targets import open_target
from train.flags import from_flags

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "texts.jsonl").write_text('{"text": "hello"}\n{"text": "world"}\n')
    (tmp_path / "answers.jsonl").write_text('{"prompt": "hi", "label": "hi"}\n')
    return [tmp_path / "texts.jsonl", tmp_path / "answers.jsonl"]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer(lambda prompt, seed: f"{prompt} and {seed}")
    yield fake
    fake.close()


def eval_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train", "eval", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def test_the_flags_are_the_options() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert from_flags(Options, parser.parse_args([])) == Options()
    given = ["--stop", "a", "b", "--chat", "--samples", "3", "--temperature", "0.5", "--lm-eval", "x.yaml"]
    wanted = Options(stop=("a", "b"), chat=True, samples=3, temperature=0.5, lm_eval=("x.yaml",))
    assert from_flags(Options, parser.parse_args(given)) == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limit": -1}, "--limit -1 is negative"),
        ({"max_tokens": 0}, "--max-tokens 0 is too small"),
        ({"samples": 5}, "--samples 5 at --temperature 0 are all the same"),
        ({"window": 1}, "--window 1 must be above 1"),
        ({"window": 8, "stride": 8}, "--window 8 must be above 1, and above --stride 8"),
    ],
)
def test_options_that_cannot_be_are_errors(values: dict[str, int], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        Options(**values)  # type: ignore[arg-type]


def test_the_command_prints_a_table_and_a_document(server: FakeServer, files: list[Path], tmp_path: Path) -> None:
    done = eval_command(server.url, *map(str, files), "--answers", str(tmp_path / "said.jsonl"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:4] for line in lines[:3]] == [
        ["file", "task", "examples", "figure"],
        ["texts.jsonl", "perplexity", "2", "perplexity"],
        ["bits_per_byte", *lines[2].split()[1:4]],
    ]
    report = json.loads(lines[-1])
    assert report["target"] == {"kind": "server", "url": server.url, "model": "fake"}
    assert report["options"] == json.loads(json.dumps(asdict(Options())))
    assert [result["counts"] for result in report["results"]] == [
        {"tokens": 8, "bytes": 8},
        {"classes": 1, "unmatched": 0},
    ]
    assert report["results"][1]["metrics"]["accuracy"] == 1
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [(line["task"], line.get("answer")) for line in said] == [
        ("perplexity", None),
        ("perplexity", None),
        ("classification", "hi and 0"),
    ]


def test_what_a_server_refuses_is_skipped_and_said(server: FakeServer, files: list[Path], tmp_path: Path) -> None:
    server.echo = False
    done = eval_command(server.url, *map(str, files), "-o", str(tmp_path / "report.json"))
    assert (done.returncode, done.stderr) == (1, "")
    assert "skipped" in done.stdout
    assert "echo is not supported" in done.stdout
    skipped, judged = json.loads((tmp_path / "report.json").read_text())["results"]
    assert "echo is not supported" in skipped["skipped"]
    assert judged["metrics"]["accuracy"] == 1


def test_wrong_input_is_an_error_before_anything_is_judged(server: FakeServer, files: list[Path]) -> None:
    bad = files[0].with_name("bad.jsonl")
    bad.write_text('{"oops": 1}\n')
    done = eval_command(server.url, str(files[1]), str(bad))
    assert done.returncode == 2
    assert done.stderr.startswith(f"train: {bad}:1 has the columns oops")
    assert server.bodies == []
    assert "nothing to judge by" in eval_command(server.url).stderr


def test_a_target_of_ones_own_can_be_judged(files: list[Path]) -> None:
    report = evaluate(FakeTarget(lambda prompt: "no"), files, Options(limit=1))
    assert [result["examples"] for result in report["results"]] == [1, 1]
    assert report["results"][1]["metrics"]["accuracy"] == 0
    assert json.loads(json.dumps(report))["results"][0]["metrics"]["perplexity"] == pytest.approx(math.e)
    assert "perplexity" in table(report)


def test_a_head_for_classes_is_judged_by_classification_alone(files: list[Path], tmp_path: Path) -> None:
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"text": "oh!", "label": "good"}\n')
    first, second = evaluate(FakeClassifier(), [files[0], labelled])["results"]
    assert "cannot be judged by perplexity" in first["skipped"]
    assert second["metrics"] == {"accuracy": 1, "macro_f1": 1}


def test_what_is_no_target_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"has no config.json; give a checkpoint's directory or a server's URL"):
        open_target(tmp_path, Options())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TrainError, match=r"config.json is no JSON"):
        open_target(tmp_path, Options())
