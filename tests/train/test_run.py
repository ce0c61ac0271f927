"""Whole runs of a tiny model: what they learn, how they end, and that they go on exactly where they were."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.train.tiny import make_checkpoint
from train.__main__ import parser
from train.batches import PackedBatches
from train.errors import TrainError
from train.run import EXIT_ENDED, run
from train.tracker import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
SENTENCES = ("The wheel turns. ", "A pawl holds it. ", "It goes only forward, tooth by tooth. ")
RECORDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": SENTENCES[n % 3] * (2 + n % 7)} for n in range(40)],
    "chat": [{"prompt": f"Say {n % 5}.", "completion": f"{n % 5}"} for n in range(30)],
    "pairs": [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "no"} for n in range(12)],
    "thumbs": [{"prompt": f"Say {n}.", "completion": f"{n}", "label": n % 3 > 0} for n in range(12)],
    "classes": [{"text": "buy now" if n % 2 else "see you", "label": "spam" if n % 2 else "ham"} for n in range(16)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a JSONL file for each shape of data."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    make_checkpoint(folder / "checkpoint")
    for name, records in RECORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def words(base: Path, output: Path, *more: object, data: str = "text") -> list[str]:
    given = ["run", base / "checkpoint", "--data", base / f"{data}.jsonl", "--output", output, "--tracker", "none"]
    given += ["--context", 64, "--batch", 4, "--learning-rate", 0.005, *more]
    return [str(word) for word in given]


def call(base: Path, output: Path, *more: object, data: str = "text") -> int:
    return run(parser("run").parse_args(words(base, output, *more, data=data)))


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output) if "loss" in row]


@pytest.mark.filterwarnings("ignore")  # dynamo has warnings of its own
def test_compiled_layers_learn_the_same(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for inductor, whose C++ takes a minute to compile, and run without it."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: whole(layer, backend="aot_eager"))
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert call(base, tmp_path / name, "--steps", 2, *more) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors").keys() for name in ("eager", "compiled")]
    assert weights[0] == weights[1]


def held_out_losses(output: Path) -> list[float]:
    return [row["held_out_loss"] for row in read_metrics(output) if "held_out_loss" in row]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed."""
    output = tmp_path_factory.mktemp("alone") / "run"
    assert call(base, output, "--steps", 12, "--held-out", base / "text.jsonl") == 0
    return output


def test_a_run_learns_and_leaves_a_checkpoint_and_its_story(alone: Path, base: Path) -> None:
    assert losses(alone)[-1] < losses(alone)[0] - 1
    judged = held_out_losses(alone)
    assert len(judged) == 12
    assert judged[-1] < judged[0]
    model = AutoModelForCausalLM.from_pretrained(alone / "model")
    tokenizer = AutoTokenizer.from_pretrained(alone / "model")
    tokens = torch.tensor([tokenizer(SENTENCES[0] * 3)["input_ids"]])
    assert model(tokens, labels=tokens).loss < losses(alone)[0] - 1
    story = json.loads((alone / "model" / "training.json").read_text())
    assert (story["objective"], story["steps"], story["rejected_steps"]) == ("next-token", 12, 0)
    assert story["data"]["sources"][0]["name"] == "text.jsonl"
    assert len(story["parent"]) == 64
    assert json.loads((alone / "environment.json").read_text())["versions"]["torch"]
    assert (alone / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps = [row for row in read_metrics(alone) if "loss" in row]
    assert sum(row["batch_tokens"] for row in steps) == steps[-1]["tokens"] == story["tokens"]
    assert all(0 < row["mfu"] < 1 and row["tokens_per_second"] > 0 for row in steps)


def test_a_run_that_is_done_is_not_done_again(alone: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (alone / "metrics.jsonl").read_bytes()
    assert call(base, alone, "--steps", 12, "--held-out", base / "text.jsonl") == 0
    assert "done" in capsys.readouterr().out
    assert (alone / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_nothing(micro: int, alone: Path, base: Path, tmp_path: Path) -> None:
    assert call(base, tmp_path / "run", "--steps", 12, "--micro-batch", micro) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_recomputed_activations_change_nothing(alone: Path, base: Path, tmp_path: Path) -> None:
    assert call(base, tmp_path / "run", "--steps", 12, "--checkpoint-activations") == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, alone: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = PackedBatches.batch

    def disturbed(self: PackedBatches, step: int, part: int = 0, parts: int = 1) -> Any:
        if step == 5:
            signal.raise_signal(number)
        return batch(self, step, part, parts)

    with monkeypatch.context() as patch:
        patch.setattr(PackedBatches, "batch", disturbed)
        assert call(base, tmp_path / "run", "--steps", 12) == EXIT_ENDED
    assert len(losses(tmp_path / "run")) == 6
    assert call(base, tmp_path / "run", "--steps", 12) == 0
    assert losses(tmp_path / "run") == losses(alone)
    assert same(tmp_path / "run", alone)


def test_killed_at_a_random_step_it_ends_with_the_same_weights(alone: Path, base: Path, tmp_path: Path) -> None:
    """SIGKILL, again and again, each time after a few more steps."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "train", *words(base, output, "--steps", 12, "--save-every-steps", 2)]
    last = random.randrange(3, 11)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        seen = 0
        while seen < last and process.poll() is None:
            metrics = output / "metrics.jsonl"
            seen = metrics.read_text().count('"loss"') if metrics.exists() else 0
        process.send_signal(signal.SIGKILL)
        assert process.stderr
        told = process.stderr.read()
    assert seen >= last, told
    assert not (output / "model").exists()
    assert call(base, output, "--steps", 12, "--save-every-steps", 2) == 0
    assert losses(output) == losses(alone)
    assert same(output, alone)


def test_two_processes_learn_what_one_does(alone: Path, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    command += words(base, output, "--steps", 12, "--held-out", base / "text.jsonl")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(output) == pytest.approx(losses(alone), rel=1e-4)
    assert held_out_losses(output) == pytest.approx(held_out_losses(alone), rel=1e-4)
    one, other_weights = weights(output), weights(alone)
    assert one.keys() == other_weights.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other_weights[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("objective", "data", "more"),
    [
        ("sft", "chat", ()),
        ("sft", "chat", ("--adapter", "lora", "--lora-rank", 4)),
        ("dpo", "pairs", ()),
        ("dpo", "pairs", ("--adapter", "lora")),
        ("kto", "thumbs", ()),
        ("classify", "classes", ()),
        ("distill", "text", ("--teacher", "checkpoint", "--teacher-precision", "float32", "--optimizer", "adamw")),
    ],
)
def test_every_objective_runs(objective: str, data: str, more: tuple[object, ...], base: Path, tmp_path: Path) -> None:
    given = [base / "checkpoint" if word == "checkpoint" else word for word in more]
    output = tmp_path / "run"
    assert call(base, output, "--objective", objective, "--steps", 6, *given, data=data) == 0
    if objective == "distill":
        assert losses(output)[0] == pytest.approx(0, abs=1e-4)  # the student is its own teacher
    else:
        assert losses(output)[-1] < losses(output)[0]
    kind: Any = AutoModelForSequenceClassification if objective == "classify" else AutoModelForCausalLM
    model = kind.from_pretrained(output / "model")
    changed = [
        name
        for name, value in load_file(base / "checkpoint" / "model.safetensors").items()
        if not torch.equal(value, model.state_dict()[name])
    ]
    assert changed or objective == "distill"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--objective", "sing"), "next-token, sft"),
        (("--context", 1000), "model's 256"),
        (("--batch", 0), "--batch 0"),
        (("--objective", "distill"), "teacher"),
        (("--lora-rank", 0, "--adapter", "lora"), "--lora-rank 0"),
    ],
)
def test_what_does_not_fit_is_refused(more: tuple[object, ...], told: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=told):
        call(base, tmp_path / "run", *more)


def test_a_folder_with_another_run_is_refused(alone: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainError, match="not empty"):
        call(base, tmp_path)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "options.json").write_bytes((alone / "options.json").read_bytes())
    with pytest.raises(TrainError, match="steps was 12 and is now 7"):
        call(base, unfinished, "--steps", 7)


def test_a_loss_that_is_no_number_ends_the_run(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "base"
    broken.mkdir()
    for file in [*(base / "checkpoint").iterdir(), base / "text.jsonl"]:
        place = broken / ("" if file.suffix == ".jsonl" else "checkpoint") / file.name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(file.read_bytes())
    path = broken / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(TrainError, match="not finite"):
        call(broken, tmp_path / "run", "--steps", 20, "--max-rejected", 3)
    assert len(read_metrics(tmp_path / "run")) == 2


def test_other_data_is_not_gone_on_with(
    alone: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = PackedBatches.batch

    def disturbed(self: PackedBatches, step: int, part: int = 0, parts: int = 1) -> Any:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, step, part, parts)

    data = tmp_path / "text.jsonl"
    data.write_bytes((base / "text.jsonl").read_bytes())
    (tmp_path / "checkpoint").symlink_to(base / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(PackedBatches, "batch", disturbed)
        assert call(tmp_path, tmp_path / "run", "--steps", 4) == EXIT_ENDED
    data.write_text(data.read_text() + '{"text": "One more."}\n')
    with pytest.raises(TrainError, match="other data"):
        call(tmp_path, tmp_path / "run", "--steps", 4)
