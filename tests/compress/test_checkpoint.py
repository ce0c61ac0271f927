"""Checkpoints on disk: what is read, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.checkpoint import Checkpoint, CheckpointError


@pytest.fixture
def path(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_are_read_as_float32(dtype, path):
    values = np.array([[1.5, -2.0], [0.25, 1024.0]])
    save_file({"a": values.astype(dtype)}, path / "model.safetensors")
    found = Checkpoint(path).read("a")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)
    found *= 2  # the caller owns it
    np.testing.assert_array_equal(Checkpoint(path).read("a"), values)


def test_shards_are_found_by_the_index(path):
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for i, (tensor, file) in enumerate(names.items()):
        save_file({tensor: np.full(3, i, np.float32)}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    checkpoint = Checkpoint(path)
    assert checkpoint.names == {"a", "b"}
    np.testing.assert_array_equal(checkpoint.read("b"), np.ones(3))
    (path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors, which .* lists"):
        Checkpoint(path)


def test_a_sharded_model_of_transformers(tiny, tmp_path):
    model, single = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    whole, shards = Checkpoint(single), Checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert whole.names == shards.names
    for name in whole.names:
        np.testing.assert_array_equal(whole.read(name), shards.read(name))


@pytest.mark.parametrize("file", ["../a.safetensors", "/a.safetensors", "other/a.safetensors"])
def test_an_index_cannot_lead_out_of_the_directory(file, path):
    save_file({"a": np.ones(3, np.float32)}, path.parent / "a.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="lacks"):
        Checkpoint(path)


def test_the_digest_names_config_and_weights(tiny, tmp_path):
    _, source = tiny("llama")
    digest = Checkpoint(source).digest
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "README.md").write_text("not part of it")
    assert Checkpoint(copy).digest == digest
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert Checkpoint(copy).digest != digest
    shutil.copy(source / "model.safetensors", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert Checkpoint(copy).digest != digest


def test_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json.*save_pretrained"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_broken_config(text, message, path):
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path)


def test_missing_weights(path):
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        Checkpoint(path)
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin may run code.*save_pretrained"):
        Checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"version https://git-lfs.github.com/spec/v1\n" * 3])
def test_not_safetensors(content, path):
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a safetensors file or is truncated"):
        Checkpoint(path)


def test_truncated_weights(path):
    save_file({"a": np.ones((100, 100), np.float32)}, path / "model.safetensors")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(path)


def test_missing_tensor_is_named(path):
    save_file({"a": np.ones(3, np.float32)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor model\.norm\.weight"):
        Checkpoint(path).read("model.norm.weight")


def test_quantized_tensors_are_refused(path):
    save_file({"a": np.ones(3, np.int8)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is I8; F32, F16, BF16 are readable.*before its quantization"):
        Checkpoint(path).read("a")
