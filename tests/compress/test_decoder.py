"""The decoder graph against transformers, family by family."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import onnx
import pytest

from compress.checkpoint import Checkpoint, CheckpointError
from compress.decoder import build
from compress.families import FAMILIES, describe
from compress.precisions import FLOAT, W4A8, W8A8
from compress.treatment import Treatment
from proto.manifest import Precision, Recipe

CLOSE = {"rtol": 0, "atol": 1e-3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one head": ("llama", {"num_key_value_heads": 1}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": LINEAR}),
    "yarn rope": ("llama", {"rope_parameters": YARN}),
    "mistral short window": ("mistral", {"sliding_window": 7}),
    "mistral long window": ("mistral", {"sliding_window": 40}),
    "mistral no window": ("mistral", {"sliding_window": None}),
    "qwen2 window in one layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tiny, make_graph, reference, tokens):
    family, overrides = CASES[case]
    model, path = tiny(family, **overrides)
    expected = reference(model, tokens)
    graph = make_graph(path, slots=3)
    np.testing.assert_allclose(graph.logits(tokens), expected, **CLOSE, err_msg="whole prompt")
    found = [graph.logits(tokens[start:end], past=start, slot=1) for start, end in ((0, 16), (16, 21), (21, 30))]
    np.testing.assert_allclose(np.concatenate(found), expected, **CLOSE, err_msg="prompt in chunks")
    # Three rows of different lengths, prefilled one by one into their slots, then decoded together.
    lengths = [3, 17, 9]
    for slot, length in enumerate(lengths):
        graph.logits(tokens[:length], slot=slot)
    for step in range(5):
        positions = [length + step for length in lengths]
        (found,) = graph.run(np.array([[tokens[p]] for p in positions]), [p + 1 for p in positions])
        np.testing.assert_allclose(found, expected[positions], **CLOSE, err_msg=f"decode step {step}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_padded_on_the_right(family, tiny, make_graph, reference, tokens):
    model, path = tiny(family)
    lengths = [5, 12]
    (found,) = make_graph(path, slots=2).run(np.array([tokens[:12], tokens[:12]]), lengths)
    for row, length in enumerate(lengths):
        expected = reference(model, tokens[:length])
        np.testing.assert_allclose(found.reshape(2, 12, -1)[row, :length], expected, **CLOSE)


def test_hidden_rows_are_those_asked_for(tiny, make_graph, tokens):
    model, path = tiny("llama")
    graph = make_graph(path)
    logits, hidden = graph.run(np.array([tokens]), [30], outputs=("logits", "hidden"))
    np.testing.assert_allclose(hidden @ model.lm_head.weight.detach().numpy().T, logits, **CLOSE)


def test_old_rope_settings_are_read(tiny, tmp_path):
    """Before version 5, transformers wrote `rope_theta` and `rope_scaling`, whose kind was once called `type`."""
    _, path = tiny("llama", rope_parameters=LINEAR)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    config |= {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    new, old = describe(Checkpoint(path)).rope, describe(Checkpoint(tmp_path)).rope
    assert {key: old[key] for key in LINEAR} == {key: new[key] for key in LINEAR}


def test_old_gemma_settings_are_read(tiny, tmp_path):
    """Before version 5: every sixth layer sees all, and two numbers for the rotary bases."""
    _, path = tiny("gemma3_text")
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"], config["layer_types"]
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "num_hidden_layers": 7, "sliding_window_pattern": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = describe(Checkpoint(tmp_path))
    assert decoder.windows == (7, 7, None, 7, 7, None, 7)
    assert [decoder.rope_of(layer) for layer in (1, 2)] == ["rope.local", "rope"]
    assert {name: rope["rope_theta"] for name, rope in decoder.ropes.items()} == {"rope": 1e6, "rope.local": 1e4}


def test_gpt2_saved_without_a_prefix(tiny, make_graph, reference, tokens, tmp_path):
    model, _ = tiny("gpt2")
    model.transformer.save_pretrained(tmp_path / "bare")
    np.testing.assert_allclose(make_graph(tmp_path / "bare").logits(tokens), reference(model, tokens), **CLOSE)


def test_architecture_is_for_the_manifest(tiny, make_graph):
    _, path = tiny("qwen3", eos_token_id=[5, 6])
    found = make_graph(path, max_context=48).architecture
    assert (found.family, found.num_layers, found.num_heads, found.num_kv_heads) == ("qwen3", 2, 4, 2)
    assert (found.head_size, found.hidden_size, found.vocab_size, found.max_context) == (32, 64, 160, 48)
    assert found.eos_token_ids == [5, 6]


def test_unknown_architecture_names_the_supported(tmp_path, tiny):
    _, path = tiny("llama")
    config = json.loads((path / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'mamba' is not supported\. Supported are gemma3_text, gpt2, llama, mistral, qwen2"
    ):
        describe(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_type 'dynamic' is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
    ],
)
def test_what_is_not_built_is_refused(family, overrides, message, tiny, tmp_path):
    _, path = tiny(family, **overrides)
    with pytest.raises(CheckpointError, match=message):
        build(Checkpoint(path), tmp_path, Recipe(name="fp32", default=FLOAT))


def test_a_config_that_does_not_fit_the_weights_is_refused(tiny, make_graph, tmp_path):
    _, path = tiny("llama")
    config = json.loads((path / "config.json").read_text()) | {"intermediate_size": 80}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \(96, 64\)"):
        make_graph(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 200}, "max_context 200 is more than the 128"),
        (
            {"treat": lambda layer: Treatment(kv_scales=(np.ones(1), np.ones(1)) if layer == 1 else None)},
            "1 of 2 layers have kv_scales: give all of them or none",
        ),
        ({"recipe": Recipe(name="r", default=FLOAT, products={"layers.9.o": FLOAT})}, r"names product layers\.9\.o"),
        (
            {"recipe": Recipe(name="r", default=Precision(weight_bits=8, activation_bits=16))},
            "default W8A16; there are fp32",
        ),
        ({"recipe": Recipe(name="r", default=W4A8)}, "gives the head 4-bit weights, which are the embedding too"),
    ],
)
def test_wrong_options_are_refused(options, message, tiny, make_graph):
    _, path = tiny("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=message):
        make_graph(path, **options)


def test_the_graph_is_deterministic_and_its_large_weights_are_outside(tiny, tmp_path):
    _, path = tiny("llama", tie_word_embeddings=True)
    files: list[bytes] = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        build(Checkpoint(path), directory, Recipe(name="fp32", default=FLOAT))
        files.append((directory / "model.onnx").read_bytes() + (directory / "model.onnx.data").read_bytes())
    assert files[0] == files[1]
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (
        10,
        [("", 21), ("com.microsoft", 1)],
    )
    vocab_by_hidden = [tensor.name for tensor in model.graph.initializer if 160 in tensor.dims]
    assert vocab_by_hidden == ["head.weight"]  # tied: stored once
    for tensor in model.graph.initializer:
        placed = {entry.key: entry.value for entry in tensor.external_data}
        assert not placed or int(placed["offset"]) % 4096 == 0
    assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) < 10_000


@pytest.mark.parametrize("recipe", [FLOAT, W8A8, W4A8])
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_bounded_by_the_largest_tensor(recipe, tied, tiny, tmp_path):
    _, path = tiny("llama", vocab_size=20_000, num_hidden_layers=6, tie_word_embeddings=tied)
    largest = 20_000 * 64 * 4
    tracemalloc.start()
    heavy = {"head": W8A8} if recipe == W4A8 and tied else {}
    build(Checkpoint(path), tmp_path, Recipe(name="any", default=recipe, products=heavy), max_context=16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest < peak < 2 * largest + 500_000
