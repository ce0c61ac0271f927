"""The plan of a run: figures by hand, guesses, clear refusals."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.train.tiny import make_tokenizer
from train import plan
from train.errors import TrainError
from train.flags import from_flags
from train.flops import parameters
from train.hardware import GIB, HARDWARE
from train.plan import Options, guess, make_plan, quantity


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    AutoConfig.for_model("gpt2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "value"), [("124M", 124e6), ("1.1b", 1.1e9), ("20B", 20e9), ("1.4T", 1.4e12), ("2e9", 2e9), ("500k", 5e5)]
)
def test_quantities(text: str, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "B", "1.1X", "1,000", "-5M", "0", "nan", "inf", "infB"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="give"):
        quantity(text)


def test_gpt2_small_on_eight_gpus_by_hand(gpt2: Path) -> None:
    made = make_plan(Options(model=str(gpt2), tokens=10e9, hardware="a100", count=8, context=1024, price=2.0, mfu=0.5))
    per_token = 6 * (84_934_656 + 50257 * 768) + 12 * 12 * 768 * 1024
    assert made["flops_per_token"] == per_token
    assert made["flops"] == pytest.approx(10e9 * per_token)
    assert made["tokens_per_parameter"] == pytest.approx(10e9 / 124_439_808)
    assert made["chinchilla_tokens"] == 20 * 124_439_808
    assert made["checkpoint_bytes"] == 4 * 124_439_808
    assert made["resume_bytes"] == 12 * 124_439_808
    assert made["micro_batch_seconds"] == pytest.approx(8 * 1024 * per_token / (312e12 * 0.5))
    assert made["optimizer_seconds"] == pytest.approx(28 * 124_439_808 / 2.04e12)
    rows = {row["name"]: row for row in made["layouts"] if not row["recomputed"]}
    hours = 10e9 * per_token / (312e12 * 0.5) / 3600
    assert rows["adamw"]["hours"] == pytest.approx(hours)
    assert rows["FSDP, adamw"]["hours"] == pytest.approx(hours / 8)
    assert rows["FSDP, adamw"]["dollars"] == rows["adamw"]["dollars"] == pytest.approx(2.0 * hours)
    assert all(row["fits"] for row in made["layouts"])


def test_what_does_not_fit_is_said() -> None:
    made = make_plan(Options(parameters=7e9, hardware="rtx4090", micro_batch=1, context=512))
    fits = {row["name"]: row["fits"] for row in made["layouts"] if row["recomputed"]}
    assert fits == {"adamw": False, "muon": False, "LoRA": False, "QLoRA": True}


def test_flags_replace_what_is_listed(gpt2: Path) -> None:
    listed = make_plan(Options(model=str(gpt2), hardware="l4"))["hardware"]
    assert (listed["peak_flops"], listed["mfu"], listed["price"]) == (121e12, 0.4, HARDWARE["l4"].price)
    options = Options(model=str(gpt2), hardware="l4", peak_tflops=100, memory_gib=10, price=0, mfu=0.3)
    changed = make_plan(options)["hardware"]
    assert (changed["peak_flops"], changed["mfu"], changed["price"]) == (100e12, 0.3, 0)
    assert changed["memory"] == 10 * GIB


@pytest.mark.parametrize(("wanted", "within"), [(20e6, 0.08), (135e6, 0.03), (1.1e9, 0.01), (7e9, 0.01), (70e9, 0.01)])
def test_a_guess_has_about_as_many_parameters(wanted: float, within: float) -> None:
    shape = guess(wanted, 32768)
    assert parameters(shape).total == pytest.approx(wanted, rel=within)
    assert 40 <= shape.width / shape.layers <= 90


def test_chinchillas_budget() -> None:
    made = make_plan(Options(parameters=70e9, tokens=1.4e12))
    assert made["flops"] == pytest.approx(5.88e23, rel=0.06)


def test_tokens_of_data_are_estimated(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "12345678"}\n{"messages": [{"role": "user", "content": "äb"}]}\n')
    data = (tmp_path / "data.jsonl",)
    assert make_plan(Options(model=str(gpt2), data=data, epochs=3))["tokens"] == pytest.approx(3 * 11 / 4)
    make_tokenizer().save_pretrained(tmp_path / "model")  # a token a byte
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "model")
    made = make_plan(Options(model=str(tmp_path / "model"), data=data))
    assert made["tokens"] == pytest.approx(11)
    assert made["tokens_from"] == "1 x 11 bytes, 1.00 bytes a token measured"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model CHECKPOINT or --parameters"),
        (["--model", "x", "--parameters", "1B"], "give either --model CHECKPOINT or --parameters"),
        (["--parameters", "1B", "--tokens", "1B", "--data", "x"], "give either --tokens or --data"),
        (["--parameters", "1B", "--count", "0"], "--count 0 is out of range; give at least 1"),
        (["--parameters", "1B", "--mfu", "40"], "--mfu 40 is out of range; give at most 1"),
        (["--parameters", "1M"], "the nearest model has .*; give more parameters"),
        (["--model", "nowhere"], "--model nowhere has no config.json"),
        (["--parameters", "1B", "--data", "nowhere"], "there is no nowhere"),
    ],
)
def test_nonsense_is_refused_with_a_cure(arguments: list[str], message: str) -> None:
    parser = ArgumentParser()
    plan.configure(parser)
    with pytest.raises(TrainError, match=message):
        make_plan(from_flags(Options, parser.parse_args(arguments)))


def test_the_command_prints_for_people_and_for_machines(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    plan.configure(parser)
    assert plan.run(parser.parse_args(["--model", str(gpt2), "--count", "2"])) == 0
    text = capsys.readouterr().out
    assert "124,439,808" in text
    assert "2 x h100" in text
    assert "FSDP, muon, recomputed" in text
    assert plan.run(parser.parse_args(["--model", str(gpt2), "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == make_plan(Options(model=str(gpt2)))
