"""Recipes of 16-bit floats, for CUDA: on the CPU's float16 kernels, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from compress.checkpoint import Checkpoint
from compress.decoder import build
from compress.families import FAMILIES, describe
from compress.recipes import make_recipe
from compress.summary import summarize
from proto.manifest import GRAPH, NATIVE_GRAPH, load
from serve.choices import SettingsError
from serve.device_runner import DeviceRunner
from serve.device_session import DeviceSession, open_device_session
from serve.device_stream import HOST, ON_HOST, Device
from serve.forms import pick
from serve.plan import Plan
from tests.serve.devices import DEVICES

ERRORS = {"fp16": 0.004, "w8a16": 0.04, "w4a16": 0.4}  # of the logits' size, on random weights


def open_runner(directory: Path, path: Path, recipe: str, device: Device) -> DeviceRunner:
    """Build, and run with the server's own runner."""
    checkpoint = Checkpoint(path)
    architecture = build(checkpoint, directory, make_recipe(recipe, describe(checkpoint)))
    session = open_device_session(directory / GRAPH, device)
    return DeviceRunner(session, architecture, num_slots=3, capacity=64, max_rows=64, stream=session.stream)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ERRORS)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_those_of_transformers_within_the_types_error(
    device: Device, recipe: str, family: str, tied: bool, tiny, reference, tokens, tmp_path: Path
) -> None:
    model, path = tiny(family, tie_word_embeddings=tied)
    expected = reference(model, tokens)
    runner = open_runner(tmp_path, path, recipe, device)
    lengths = (28, 9)
    rows = []
    for slot, length in enumerate(lengths):
        for start, end in ((0, length - 5), (length - 5, length)):
            plan = Plan()
            plan.add([slot], start, tokens[start:end], want="all")
            found = runner.run(plan)
            rows.append(found.logits[found.rows])
    plan = Plan()
    for slot, length in enumerate(lengths):
        plan.add([slot], length, [tokens[length]])
    found = runner.run(plan)
    rows.append(found.logits[found.rows])
    logits = np.concatenate(rows)
    wanted = expected[[*range(28), *range(9), 28, 9]]
    assert logits.dtype == np.float32
    assert np.linalg.norm(logits - wanted) < ERRORS[recipe] * np.linalg.norm(wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_bfloat16_graph_is_the_float16_one_in_another_type(family: str, tied: bool, tiny, tmp_path: Path) -> None:
    """No CPU runs it: so every node, shape and constant is held to those of the graph that the CPU does run."""
    _, path = tiny(family, tie_word_embeddings=tied)
    models = {}
    for recipe in ("fp16", "bf16"):
        (tmp_path / recipe).mkdir()
        checkpoint = Checkpoint(path)
        build(checkpoint, tmp_path / recipe, make_recipe(recipe, describe(checkpoint)))
        models[recipe] = onnx.load(tmp_path / recipe / GRAPH).graph
    half, brain = models.values()
    assert list(half.node) == list(brain.node)
    for one, other in zip([*half.input, *half.output], [*brain.input, *brain.output], strict=True):
        assert one.name == other.name
        types = one.type.tensor_type, other.type.tensor_type
        assert types[0].shape == types[1].shape
        expected = {TensorProto.FLOAT16: TensorProto.BFLOAT16}.get(types[0].elem_type, types[0].elem_type)
        assert types[1].elem_type == expected
    kinds = set()
    for one, other in zip(half.initializer, brain.initializer, strict=True):
        a, b = (numpy_helper.to_array(tensor) for tensor in (one, other))
        assert (one.name, a.shape) == (other.name, b.shape)
        kinds.add((one.data_type, other.data_type))
        np.testing.assert_allclose(b.astype(np.float64), a.astype(np.float64), rtol=2**-8, atol=1e-6)
    same = {(kind, kind) for kind in (TensorProto.INT64, TensorProto.FLOAT)}  # FLOAT: limits of the choice
    assert kinds == {(TensorProto.FLOAT16, TensorProto.BFLOAT16), *same}


def test_a_weight_beyond_float16_is_refused(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = tiny("llama")
    checkpoint = Checkpoint(path)
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda name: read(name) * (1e6 if "layers.1.mlp.up" in name else 1))
    with pytest.raises(ValueError, match=r"layers\.1\.gate_up\.weight holds \d+, beyond float16; use recipe bf16"):
        build(checkpoint, tmp_path, make_recipe("fp16", describe(checkpoint)))
    (tmp_path / "bf16").mkdir()
    build(checkpoint, tmp_path / "bf16", make_recipe("bf16", describe(checkpoint)))


@pytest.mark.parametrize(
    ("flags", "recipe", "kv"),
    [((), "fp16", "fp16"), (("--recipe", "w8a16"), "w8a16", "fp16"), (("--kv", "int8"), "fp16", "int8")],
)
def test_an_artifact_for_cuda_is_judged_here_and_refused_by_a_server_on_cpus(
    flags: tuple[str, ...], recipe: str, kv: str, quantize, tmp_path: Path, capsys
) -> None:
    assert quantize(tmp_path / "made", "--target", "cuda", *flags) == 0
    assert "passed the gate" in capsys.readouterr().out
    manifest = load(tmp_path / "made")
    assert (manifest.target, manifest.recipe.name, manifest.kv_cache) == ("cuda", recipe, kv)
    assert manifest.gate
    assert manifest.gate.passed
    assert manifest.gate.serving == {}
    assert NATIVE_GRAPH not in manifest.files
    a = manifest.architecture
    values = 2 * a.num_layers * a.num_kv_heads * a.head_size
    assert manifest.kv_bytes_per_token == values * (1 if kv == "int8" else 2)
    with pytest.raises(SettingsError, match=r"made was made for cuda .* quantize --target cpu"):
        pick("auto", manifest)


def test_what_cannot_be_judged_is_refused_or_recorded(quantize, tmp_path: Path, capsys) -> None:
    cuda = ("--target", "cuda", "--recipe", "bf16")
    assert quantize(tmp_path / "made", *cuda) == 3
    assert "recipe bf16 cannot be judged" in (refused := capsys.readouterr().err)
    assert "--ungated" in refused
    assert not (tmp_path / "made").exists()
    assert quantize(tmp_path / "made", *cuda, "--ungated") == 0
    assert "was NOT judged" in capsys.readouterr().out
    manifest = load(tmp_path / "made")
    assert manifest.gate is None
    assert manifest.kv_cache == "bf16"
    assert "NOT judged by the gate" in summarize(manifest)
    assert json.loads((tmp_path / "made/manifest.json").read_text())["gate"] is None


def test_a_gpu_that_is_not_there_is_told_before_the_work(quantize, tmp_path: Path, capsys) -> None:
    cuda = ("--target", "cuda", "--gate-device", "cuda:1")
    assert quantize(tmp_path / "made", *cuda, "--recipe", "bf16") == 2
    said = capsys.readouterr()
    assert "cuda:1 cannot be used" in said.err
    assert "requirements/gpu.txt" in said.err
    assert (said.out, list(tmp_path.glob("made*"))) == ("", [])


def test_the_gate_runs_on_the_device_that_is_named(quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def open_session(path: Path, device: Device) -> DeviceSession:
        asked.append((path.name, device))
        return open_device_session(path, HOST)

    monkeypatch.setattr("compress.quantize.open_stream", lambda device: ON_HOST)
    monkeypatch.setattr("compress.runners.open_device_session", open_session)
    assert quantize(tmp_path / "made", "--target", "cuda", "--gate-device", "cuda:1") == 0
    assert asked == [(GRAPH, Device("cuda", 1))]
    gate = load(tmp_path / "made").gate
    assert gate is not None
    assert gate.passed


@pytest.mark.gpu
def test_bfloat16_is_judged_on_a_gpu(quantize, tmp_path: Path) -> None:
    assert quantize(tmp_path / "made", "--target", "cuda", "--gate-device", "cuda", "--recipe", "bf16") == 0
    gate = load(tmp_path / "made").gate
    assert gate is not None
    assert gate.passed


def test_what_can_be_judged_is_judged_for_all_that(quantize, tmp_path: Path) -> None:
    assert quantize(tmp_path / "made", "--target", "cuda", "--ungated", "--gate", "kl<=0") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--target", "cuda", "--recipe", "w8a8"),
            "recipe w8a8 is for cpu and --target is cuda; give --target cpu, or",
        ),
        (
            ("--recipe", "fp16"),
            "recipe fp16 is for cuda and --target is cpu; give --target cuda, or one of the recipes",
        ),
        (("--target", "cuda", "--kv", "fp32"), "--kv fp32 does not go with recipe fp16: give fp16"),
        (("--kv", "bf16"), "--kv bf16 does not go with recipe w8a8: give fp32"),
        (("--gate-device", "cuda"), "--gate-device cuda is for artifacts for CUDA and --target is cpu; leave it out"),
        (("--target", "cuda", "--gate-device", "cuda:0,1"), "--gate-device cuda:0,1 is not one device; give cpu,"),
    ],
)
def test_what_does_not_go_together_is_told(
    flags: tuple[str, ...], message: str, quantize, tmp_path: Path, capsys
) -> None:
    assert quantize(tmp_path / "made", *flags) == 2
    assert message in capsys.readouterr().err
