"""The two ends of the pipeline by the same files: a checkpoint, and our real server on the artifact made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.tiny import CAPACITY, TEXT, make_artifact, start_server, stop_server
from train import evaluation
from train.evaluation.command import evaluate
from train.evaluation.options import Options

LM_EVAL = tuple(str(path) for path in sorted((Path(evaluation.__file__).parent / "tasks").glob("*.yaml")))
CHAT = [{"role": "user", "content": "What may I do?"}, {"role": "assistant", "content": "You may copy."}]
FILES = {
    "texts": [{"text": TEXT[:600]}, {"text": TEXT[600:700]}, {"text": "naïve"}],
    "chats": [{"messages": CHAT}, {"prompt": "The software", "completion": " is provided"}],
    "answers": [{"prompt": text, "reference": text[::-1]} for text in ("Licensed under", "You may", "the")]
    + [{"messages": CHAT[:1], "reference": "You may copy."}],
    "choices": [{"prompt": "This is", "choices": ["good", "bad", "fair use"], "label": "bad"}] * 2,
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A checkpoint's directory and a server's URL. In float32, so that the two ends are one model."""
    root = tmp_path_factory.mktemp("ends")
    tiny = make_artifact(root, recipe="fp32", kv="fp32", force=False)
    server = start_server(tiny, root / "records.sqlite", "--form", "stock")
    yield root / "checkpoint", server.http_url
    assert stop_server(server) == 0


def test_a_checkpoint_and_its_server_are_judged_alike(ends: tuple[Path, str], tmp_path: Path) -> None:
    files = []
    for name, examples in FILES.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(example) + "\n" for example in examples))
    options = Options(max_tokens=12, window=CAPACITY, choose="likelihood")
    reports, answers = [], []
    for end in ends:
        path = tmp_path / "said.jsonl"
        reports.append(evaluate(end, files, options, answers=path))
        answers.append([json.loads(line) for line in path.read_text().splitlines()])
    ours, servers = (report["results"] for report in reports)
    assert [result["task"] for result in ours] == ["perplexity", "perplexity", "generation", "classification"]
    for here, there in zip(ours, servers, strict=True):
        assert here["metrics"] == pytest.approx(there["metrics"], rel=1e-4)
        assert here["counts"] == there["counts"]
        assert here["sha256"] == there["sha256"]
    for here, there in zip(*answers, strict=True):
        assert here.get("answer") == there.get("answer")
        assert here.get("nats", 0) == pytest.approx(there.get("nats", 0), rel=1e-4)
    assert [report["target"]["kind"] for report in reports] == ["checkpoint", "server"]


@pytest.mark.filterwarnings("ignore")  # the harness's imports have many
@pytest.mark.timeout(300)
def test_lm_evaluation_harness_on_both_ends(ends: tuple[Path, str]) -> None:
    checkpoint, url = ends
    options = Options(limit=4, window=CAPACITY, tokenizer=str(checkpoint), lm_eval=LM_EVAL)
    ours, servers = (evaluate(end, [], options)["harness"] for end in (checkpoint, url))
    assert ours.keys() == {"python_quiz", "sums"}
    assert {task: values["examples"] for task, values in servers.items()} == {"python_quiz": 4, "sums": 4}
    for task, values in ours.items():
        assert values == pytest.approx(servers[task], abs=1e-6)
    assert {"acc,none", "acc_norm,none"} <= ours["python_quiz"].keys()
    assert "exact_match,first-number" in ours["sums"]
