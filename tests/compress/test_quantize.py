"""The command, over a tiny checkpoint: what is published, and what a failure leaves behind."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from compress.__main__ import EXIT_GATE, EXIT_USAGE, parser
from compress.budget import STRICT, WIDE, parse
from compress.precisions import W4A8_ROTATED, W8, W8A8_ROTATED
from compress.quantize import Options
from compress.recipes import RECIPES_OF, write_recipe
from proto.manifest import Manifest, Recipe, load
from tests.compress.conftest import Run

# A random model is far from robust: let it through, to see what is published then.
EASY = ("--gate", "ppl<=9, kl<=9, agreement>=0%")
IMPOSSIBLE = ("--gate", "kl<=0, agreement>=0%")


@pytest.mark.parametrize("recipe", RECIPES_OF["cpu"])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_every_recipe_publishes_a_whole_artifact(
    recipe: str, kv: str, quantize: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "tiny", *EASY, "--recipe", recipe, "--kv", kv, "--name", "small") == 0
    assert "passed the gate: perplexity" in capsys.readouterr().out
    manifest = load(tmp_path / "tiny")
    assert (manifest.name, manifest.recipe.name, manifest.kv_cache) == ("small", recipe, kv)
    native = {"model.native.onnx"} if recipe in ("w8a8", "w4a8") else set()
    copied = {"tokenizer.json", "chat_template.jinja"}
    assert manifest.files.keys() == {"model.onnx", "model.onnx.data", "report.html"} | copied | native
    assert manifest.gate is not None
    assert (manifest.gate.passed, manifest.gate.forced) == (True, False)
    assert manifest.lineage.command.startswith("python -m compress quantize ")
    assert manifest.lineage.datasets.keys() == {"calibration", "held_out"}
    assert len(set(manifest.lineage.datasets.values())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_recipe_may_be_a_file_and_an_unknown_one_is_refused(
    quantize: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(name="mine", default=W4A8_ROTATED, products={"head": W8A8_ROTATED, "layers.1.down": W8A8_ROTATED})
    write_recipe(tmp_path / "mine.json", recipe)
    assert quantize(tmp_path / "tiny", *EASY, "--recipe", str(tmp_path / "mine.json")) == 0
    assert load(tmp_path / "tiny").recipe == recipe
    assert quantize(tmp_path / "other", "--recipe", "int3") == EXIT_USAGE
    assert "unknown recipe 'int3'; there are w8a8, fp32" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_full_precision_with_a_full_precision_cache_is_the_reference(quantize: Run, tmp_path: Path) -> None:
    assert quantize(tmp_path / "tiny", "--recipe", "fp32", "--kv", "fp32") == 0
    report = judged(tmp_path / "tiny")
    assert report["perplexity_ratio"] == pytest.approx(1, abs=1e-3)
    assert report["kl"] == pytest.approx(0, abs=1e-5)
    assert report["greedy_agreement"] == 1


def test_wider_weights_are_nearer_to_the_reference(quantize: Run, tmp_path: Path) -> None:
    for recipe in ("w8a8", "w4a8"):
        assert quantize(tmp_path / recipe, *EASY, "--recipe", recipe, "--kv", "fp32") == 0
    assert judged(tmp_path / "w8a8")["kl"] < judged(tmp_path / "w4a8")["kl"]


def test_all_products_of_8_bits_read_rotated_inputs(quantize: Run, tmp_path: Path) -> None:
    assert quantize(tmp_path / "tiny", *EASY) == 0
    recipe = load(tmp_path / "tiny").recipe
    assert (recipe.default, recipe.products) == (W8A8_ROTATED, {})


def test_4_bit_weights_are_in_groups_but_for_the_head(quantize: Run, tmp_path: Path) -> None:
    assert quantize(tmp_path / "tiny", *EASY, "--recipe", "w4a8") == 0
    recipe = load(tmp_path / "tiny").recipe
    assert (recipe.default, recipe.products) == (W4A8_ROTATED, {"head": W8A8_ROTATED})


def test_weight_only_recipes_are_nearer_the_more_bits_they_have(quantize: Run, tmp_path: Path) -> None:
    for recipe in ("w8", "w4"):
        assert quantize(tmp_path / recipe, *EASY, "--recipe", recipe, "--kv", "fp32") == 0
    assert load(tmp_path / "w4").recipe.products == {"head": W8}
    assert judged(tmp_path / "w8")["kl"] < 0.1 * judged(tmp_path / "w4")["kl"]
    assert judged(tmp_path / "w8")["greedy_agreement"] > 0.95


def test_a_failed_gate_leaves_nothing_behind(quantize: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path / "tiny", *IMPOSSIBLE) == EXIT_GATE == 3
    assert list(tmp_path.iterdir()) == []
    message = capsys.readouterr().err
    assert re.search(r"the gate failed and nothing was published: .*kl \S+ \(\S+ to \S+, limit 0\).*--force", message)


def test_force_publishes_and_says_so(
    quantize: Run, compress: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "tiny", *IMPOSSIBLE, "--force") == 0
    assert "was forced through the gate" in capsys.readouterr().out
    report = load(tmp_path / "tiny").gate
    assert report is not None
    assert (report.passed, report.forced) == (False, True)
    assert report.thresholds == {"kl": 0, "greedy_agreement": 0}
    assert compress("inspect", tmp_path / "tiny") == 0
    assert "gate FAILED (forced)" in capsys.readouterr().out


def test_inspect_tells_the_recipe_and_the_figures(
    quantize: Run, compress: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "tiny", *EASY, "--recipe", "w4a8") == 0
    capsys.readouterr()
    assert compress("inspect", tmp_path / "tiny") == 0
    shown = capsys.readouterr().out
    assert "recipe w4a8: products W4A8 rotated, 1 of them W8A8 rotated" in shown
    assert "KV cache int8" in shown
    assert "gate passed on" in shown
    for name, value in judged(tmp_path / "tiny").items():
        assert re.search(rf"^ +{name} +{re.escape(f'{value:.5g}')}( |$)", shown, re.MULTILINE), name
    assert "limit 9" in shown
    assert all(name in shown for name in load(tmp_path / "tiny").files)


@pytest.mark.parametrize("taken", ["empty", "file"])
def test_an_output_that_exists_is_refused(
    taken: str, quantize: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tiny"
    output.mkdir() if taken == "empty" else output.write_text("mine")
    assert quantize(output, "--force") == EXIT_USAGE
    assert f"{output} exists; remove it or name another" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [output]


def test_an_unknown_architecture_is_named_with_the_known_ones(
    quantize: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in checkpoint.iterdir():
        (source / path.name).symlink_to(path)
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "mamba"}
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    assert quantize(tmp_path / "tiny", source=source) == EXIT_USAGE
    message = capsys.readouterr().err
    assert "model_type 'mamba' is not supported. Supported are gemma3_text, gpt2, llama, mistral, qwen2" in message
    assert not (tmp_path / "tiny").exists()


def test_what_is_no_checkpoint_and_no_artifact_is_told(
    quantize: Run, compress: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "tiny", source=tmp_path) == EXIT_USAGE
    assert "is not a checkpoint: it has no config.json" in capsys.readouterr().err
    assert compress("inspect", tmp_path) == EXIT_USAGE
    assert "is not an artifact: it has no manifest.json" in capsys.readouterr().err


def test_a_file_changed_after_publishing_is_told(
    quantize: Run, compress: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "tiny", "--recipe", "fp32", "--kv", "fp32") == 0
    weights = tmp_path / "tiny" / "model.onnx.data"
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    assert compress("inspect", tmp_path / "tiny") == EXIT_USAGE
    assert "it was changed" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--kv", "fp8"], ["--window", "many"], ["--nonsense"]])
def test_a_wrong_flag_exits_with_usage(flags: list[str], quantize: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        quantize(tmp_path / "tiny", *flags)
    assert stopped.value.code == EXIT_USAGE
    assert list(tmp_path.iterdir()) == []


def test_each_option_is_a_flag_with_its_default() -> None:
    parsed = parser().parse_args(["quantize", "checkpoint", "-o", "output"])
    defaults = Options()
    names = {item.name for item in fields(Options)}
    assert {name: getattr(parsed, name) for name in names} == {name: getattr(defaults, name) for name in names}


def test_limits_are_the_recipes_unless_they_are_given(quantize: Run, tmp_path: Path) -> None:
    for recipe, budget in (("w8a8", STRICT), ("w4a8", WIDE)):
        assert quantize(tmp_path / recipe, "--recipe", recipe, "--force") == 0
        report = load(tmp_path / recipe).gate
        assert report is not None
        assert report.thresholds == parse(budget).thresholds


def test_a_wrong_limit_is_told_before_the_work(
    quantize: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "tiny", "--gate", "ppl<=5%") == EXIT_USAGE
    assert "'ppl<=5%' is no limit of ppl; write it as ppl<=+1%" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_each_form_is_timed_and_the_machine_named(quantize: Run, tmp_path: Path) -> None:
    assert quantize(tmp_path / "tiny", *EASY, "--measure") == 0
    report = load(tmp_path / "tiny").gate
    assert report is not None
    assert report.machine.endswith(", 2 threads")
    assert report.serving.keys() == {"native", "stock"}
    for serving in report.serving.values():
        assert serving.decode_milliseconds > 0
        assert serving.tokens_per_second > 0
        assert serving.streams == 16
        assert 10 << 20 < serving.resident_bytes < 1 << 30


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_figures_that_are_no_numbers_cannot_be_forced(
    quantize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest could not hold them."""
    monkeypatch.setattr(
        "compress.reading.score", lambda runner, window, start, end: np.full((end - start, 512), np.nan)
    )
    assert quantize(tmp_path / "tiny", "--force") == EXIT_GATE
    assert "perplexity is not a number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def judged(artifact: Path) -> dict[str, float]:
    manifest: Manifest = load(artifact)
    assert manifest.gate is not None
    return manifest.gate.metrics
