"""Pruning: what is left is what the whole computes with the parts masked, and transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress import prune as command
from compress.checkpoint import Checkpoint, CheckpointError
from compress.families import FAMILIES, Decoder, describe
from compress.importance import Importance, elimination_order, measure
from compress.prune import compare, write
from compress.pruned import Kept, PrunedCheckpoint, has_free_width
from compress.reference import Reference
from compress.shapes import Size, bytes_per_token, candidates, total_parameters
from tests.compress.conftest import Run, expected_logits, make_model
from train.flops import dimensions

LAYERS = 4
SMALLER = ["--window", "64", "--calibration-windows", "4", "--held-out-windows", "2", "--threads", "1"]


def some_of(decoder: Decoder) -> Kept:
    """Parts that differ from layer to layer, and do not begin with the first."""
    random = np.random.default_rng(3)

    def pick(count: int, kept: int) -> Any:
        return np.sort(random.permutation(count)[:kept])

    free, layers = has_free_width(decoder.family), [0, 2, 3]
    return Kept(
        layers=layers,
        hidden=pick(decoder.hidden_size, 40 if free else decoder.hidden_size),
        inner=[pick(decoder.intermediate_size, 70) for _ in layers],
        groups=[pick(decoder.num_kv_heads, 1 if free else decoder.num_kv_heads) for _ in layers],
    )


def mask(model: PreTrainedModel, decoder: Decoder, kept: Kept) -> PreTrainedModel:
    """The whole model without what is not kept: zeros in all that would carry it on."""
    d, family = decoder, decoder.family
    each = d.num_heads // d.num_kv_heads * d.head_size

    def dim(name: str, channels: Any, axis: int) -> None:
        module: Any = model.get_submodule(d.prefix + name)
        gone = np.setdiff1d(np.arange(module.weight.shape[axis]), channels)
        module.weight.data.index_fill_(axis, torch.from_numpy(gone), 0)
        if axis == (1 if family.inputs_first else 0) and getattr(module, "bias", None) is not None:
            module.bias.data[gone] = 0

    inputs, outputs = (0, 1) if family.inputs_first else (1, 0)
    if has_free_width(family):
        dim(family.embedding, kept.hidden, 1)
    for place, layer in enumerate(kept.layers):
        dim(family.down.format(i=layer), kept.inner[place], inputs)
        heads = (kept.groups[place][:, None] * each + np.arange(each)).reshape(-1)
        dim(family.o.format(i=layer), heads, inputs)
        for name in (family.o, family.down):
            dim(name.format(i=layer), kept.hidden, outputs)
    for layer in set(range(d.num_layers)) - set(kept.layers):
        for name in (family.o, family.down):
            dim(name.format(i=layer), [], outputs)
    return model


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {"tie_word_embeddings": FAMILIES[family].tied}) for family in FAMILIES if family != "gemma3_text"),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        ),
    ],
)
def test_the_pruned_model_is_the_whole_with_its_parts_masked(family, overrides, tmp_path, tokens):
    depth = {"n_layer": LAYERS} if family == "gpt2" else {"num_hidden_layers": LAYERS}
    model = make_model(family, tmp_path / "whole", **depth, **overrides)
    whole = Checkpoint(tmp_path / "whole")
    decoder = describe(whole)
    kept = some_of(decoder)
    small = PrunedCheckpoint(whole, decoder, kept)
    (tmp_path / "small").mkdir()
    write(small, tmp_path / "small")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = expected_logits(mask(model, decoder, kept), tokens)
    np.testing.assert_allclose(expected_logits(loaded.eval(), tokens), expected, rtol=1e-3, atol=2e-3)
    ours = Reference(small, describe(small), [tokens], threads=1).log_probabilities(0, 0, len(tokens))
    there = torch.log_softmax(torch.from_numpy(expected), -1).numpy()
    np.testing.assert_allclose(ours, there, rtol=1e-3, atol=2e-3)


def test_heads_and_width_of_gpt2_stay(tiny):
    _, path = tiny("gpt2")
    decoder = describe(Checkpoint(path))
    kept = Kept([0], np.arange(32), [np.arange(64)], [np.arange(4)])
    with pytest.raises(CheckpointError, match=r"gpt2 cannot lose heads or hidden channels.*give --layers or --ffn"):
        PrunedCheckpoint(Checkpoint(path), decoder, kept)


def test_types_stay_and_large_weights_are_split(tmp_path, monkeypatch):
    make_model("llama", tmp_path / "whole").to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    whole = Checkpoint(tmp_path / "whole")
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(command, "SHARD", 50_000)
    small = PrunedCheckpoint(whole, describe(whole), some_of_two(describe(whole)))
    write(small, tmp_path / "small")
    again = Checkpoint(tmp_path / "small")
    assert again.names == small.names
    files = sorted(tmp_path.glob("small/*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    for name in small.names:
        np.testing.assert_array_equal(again.read(name), small.read(name).astype("bfloat16").astype(np.float32))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_hidden_layers == 1


def some_of_two(decoder: Decoder) -> Kept:
    return Kept([1], np.arange(48), [np.arange(64)], [np.array([1])])


# -- importance -----------------------------------------------------------------------------------------------------


def test_elimination_keeps_what_the_rest_cannot_make_up_for():
    """Of inputs that say the same, one goes first, however large; then what hardly matters."""
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 6)).astype(np.float32)
    x[:, 1] = 3 * x[:, 4]
    weight = np.ones((5, 6), np.float32) * np.array([1, 5, 0.05, 1, 5, 2], np.float32)
    order = elimination_order(weight, x.T @ x)
    assert len({1, 4} & set(order[-2:])) == 1
    assert 2 in order[-2:]
    assert sorted(order) == list(range(6))
    assert order[0] in (1, 4)


def test_blocks_are_left_out_whole():
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 12)).astype(np.float32)
    weight = random.normal(size=(5, 12)).astype(np.float32) * np.repeat([1.0, 0.01, 3.0, 0.3], 3).astype(np.float32)
    assert elimination_order(weight, x.T @ x, 3).tolist() == [2, 0, 3, 1]


def test_dead_parts_are_missed_least(tmp_path, tokens):
    """A layer that adds nothing, channels that are never written, heads and MLP channels that are never read."""
    model: Any = make_model("llama", tmp_path, num_hidden_layers=3)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data[:, 10:30] = 0
    model.model.layers[0].self_attn.o_proj.weight.data[:, :32] = 0
    dead = torch.arange(5, 64, 4)
    model.model.embed_tokens.weight.data[:, dead] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[dead] = 0
        layer.mlp.down_proj.weight.data[dead] = 0
    model.save_pretrained(tmp_path)
    found = measure(Checkpoint(tmp_path), describe(Checkpoint(tmp_path)), [tokens, tokens[::-1]], threads=1)
    assert found.influence.argmin() == 1
    assert found.influence[1] == pytest.approx(0, abs=1e-6)
    assert set(found.hidden[-len(dead) :]) == set(dead.tolist())
    assert set(found.inner[2][-20:]) == set(range(10, 30))
    assert found.groups[0].tolist() == [1, 0]


def test_the_kept_parts_are_those_in_front_in_their_old_order():
    order = np.array([3, 1, 0, 2])
    found = Importance(np.array([0.1, 0.5, 0.3], np.float32), order, [order] * 3, [np.array([1, 0])] * 3)
    full = dimensions_of()
    kept = found.kept(full.__class__(**{**vars_of(full), "layers": 2, "width": 3, "inner": 2, "kv_heads": 1}))
    assert kept.layers == [1, 2]
    assert kept.hidden.tolist() == [0, 1, 3]
    assert [x.tolist() for x in kept.inner] == [[1, 3]] * 2
    assert [x.tolist() for x in kept.groups] == [[1]] * 2


# -- shapes ---------------------------------------------------------------------------------------------------------


def dimensions_of(**overrides: int) -> Any:
    import transformers

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20, "num_attention_heads": 8}
    return dimensions(transformers.LlamaConfig(**{**sizes, "num_key_value_heads": 4, "vocab_size": 1000, **overrides}))


def vars_of(shape: Any) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__slots__}


@pytest.mark.parametrize(
    ("size", "cost", "share"),
    [(Size(ratio=0.25), total_parameters, 0.75), (Size(latency=0.3), bytes_per_token, 0.7)],
)
def test_candidates_meet_the_limit_and_are_as_large_as_it_allows(size, cost, share):
    full = dimensions_of()
    found = candidates(full, size, free_width=True)
    assert len(found) > 3
    assert max(map(cost, found)) > (share - 0.03) * cost(full)
    for shape in found:
        assert cost(shape) <= share * cost(full)
        assert shape.width % shape.heads == 0
        assert shape.heads == 2 * shape.kv_heads
    narrow = candidates(full, size, free_width=False)
    assert {(shape.width, shape.kv_heads) for shape in narrow} == {(512, 4)}


def test_numbers_that_are_given_are_fixed():
    found = candidates(dimensions_of(), Size(parameters=40_000_000, layers=17), free_width=True)
    assert {shape.layers for shape in found} == {17}
    assert all(total_parameters(shape) <= 40_000_000 for shape in found)
    (shape,) = candidates(dimensions_of(), Size(ffn=1000, kv_groups=3, hidden=480), free_width=True)
    assert (shape.layers, shape.inner, shape.heads, shape.width) == (20, 1000, 6, 480)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (Size(), "nothing says how much to prune; give --ratio"),
        (Size(layers=21), "--layers 21 is more than the model's 20"),
        (Size(ratio=0.9), "no shape keeps 50% of each"),
        (Size(hidden=500), "500 is no multiple of the 8 heads.*give --hidden 496"),
    ],
)
def test_what_cannot_be_met_is_said(size, told):
    with pytest.raises(ValueError, match=told):
        candidates(dimensions_of(), size, free_width=True)


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_checkpoint_that_transformers_loads(
    compress: Run, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert compress("prune", checkpoint, "-o", out, "--ratio", "0.2", "--text", text, *SMALLER) == 0
    said = json.loads((out / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    now = said["metrics"]
    assert model.num_parameters() == now["parameters"] <= 0.8 * now["parameters_before"]
    assert said["parent"] == Checkpoint(checkpoint).digest
    assert (out / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").is_file()
    told = capsys.readouterr().out
    assert f"{now['parameters']:,} parameters of {now['parameters_before']:,}" in told
    assert now["kl"] > 0


def test_of_the_shapes_the_one_that_loses_least_is_chosen(
    compress: Run, tmp_path: Path, checkpoint: Path, text: Path
) -> None:
    """A model whose second layer adds nothing loses that layer, and no width."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).weight.data.zero_()
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (source / name).write_bytes((checkpoint / name).read_bytes())
    out = tmp_path / "small"
    assert compress("prune", source, "-o", out, "--ratio", "0.2", "--text", text, *SMALLER) == 0
    said = json.loads((out / "training.json").read_text())
    assert said["layers"] == [0]
    assert said["metrics"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "nothing says how much to prune"),
        (["--ratio", "1"], "--ratio 1 is out of range; give at most 0.9"),
        (["--layers", "1", "--window", "400"], "beyond the model's 256 tokens"),
    ],
)
def test_wrong_input_leaves_nothing(compress: Run, checkpoint: Path, text: Path, tmp_path: Path, flags, told, capsys):
    arguments = ["--text", text, "--calibration-windows", "4", "--window", "64", *flags]
    assert compress("prune", checkpoint, "-o", tmp_path / "small", *arguments) == 2
    assert told in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_model_is_no_distance_from_itself(checkpoint, tokens):
    whole = Checkpoint(checkpoint)
    expected = Reference(whole, describe(whole), [tokens], threads=1)
    perplexity, kl = compare(expected, expected, [tokens])
    assert kl == 0
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        loss = model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
    assert perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
