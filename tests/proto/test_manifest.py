"""The artifact's manifest: what is whole loads, and every way to be wrong is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proto.manifest import (
    GRAPH,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Architecture,
    GateReport,
    Lineage,
    Manifest,
    ManifestError,
    Precision,
    Recipe,
    decode,
    encode,
    list_files,
    load,
)


def write_artifact(directory: Path) -> Manifest:
    """An artifact whose files are whole, though no model."""
    directory.mkdir()
    for number, name in enumerate([GRAPH, WEIGHTS, TOKENIZER]):
        (directory / name).write_bytes(bytes([number]) * 1000)
    manifest = Manifest(
        format_version=1,
        name="tiny",
        architecture=Architecture(
            family="llama",
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_size=16,
            hidden_size=64,
            vocab_size=512,
            max_context=256,
            eos_token_ids=[0],
        ),
        recipe=Recipe(name="w8a8", default=Precision(weight_bits=8, activation_bits=8)),
        kv_cache="int8",
        target="cpu",
        files=list_files(directory),
        lineage=Lineage(checkpoint="0" * 64, datasets={"text": "f" * 64}),
        gate=GateReport(passed=True, forced=False, tokens=128, metrics={"kl": 0.1}, thresholds={"kl": 0.2}),
    )
    (directory / MANIFEST).write_bytes(encode(manifest))
    return manifest


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "artifact")
    return tmp_path / "artifact"


def change(artifact: Path, **fields: Any) -> None:
    """Overwrite fields of the manifest; a name with dots leads inwards, and ... removes."""
    path = artifact / MANIFEST
    whole = msgspec.json.decode(path.read_bytes())
    for name, value in fields.items():
        *outer, last = name.split("__")
        inner = whole
        for key in outer:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    path.write_bytes(msgspec.json.encode(whole))


def change_file(artifact: Path, name: str, **fields: Any) -> None:
    path = artifact / MANIFEST
    whole = msgspec.json.decode(path.read_bytes())
    whole["files"].setdefault(name, {"sha256": "0" * 64, "size_bytes": 1}).update(fields)
    path.write_bytes(msgspec.json.encode(whole))


def drop_file(artifact: Path, name: str) -> None:
    path = artifact / MANIFEST
    whole = msgspec.json.decode(path.read_bytes())
    del whole["files"][name]
    path.write_bytes(msgspec.json.encode(whole))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "artifact")
    assert load(tmp_path / "artifact") == manifest
    assert decode(encode(manifest)) == manifest
    assert encode(decode(encode(manifest))) == encode(manifest)


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    one, same = (write_artifact(tmp_path / name) for name in "ab")
    assert one.digest == same.digest
    assert len(one.digest) == 64
    assert msgspec.structs.replace(one, kv_cache="fp32").digest != one.digest


def test_artifacts_from_before_rotation_are_read(artifact: Path) -> None:
    change(artifact, recipe__default__activation_bits=16)
    manifest = load(artifact)
    assert manifest.recipe.default == Precision(weight_bits=8, activation_bits=16, rotated=False)
    assert b"rotated" not in encode(manifest)


def test_cache_bytes_per_token(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "artifact")
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 16
    assert msgspec.structs.replace(manifest, kv_cache="fp32").kv_bytes_per_token == 4 * 2 * 2 * 2 * 16


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda a: (a / MANIFEST).unlink(), "is not an artifact: it has no manifest.json"),
    "empty manifest": (lambda a: (a / MANIFEST).write_bytes(b""), "is not a manifest"),
    "not JSON": (lambda a: (a / MANIFEST).write_bytes(b"\x08\x01onnx"), "is not a manifest"),
    "not UTF-8": (lambda a: (a / MANIFEST).write_bytes(b'{"format_version": 1, "name": "\xff"}'), "manifest"),
    "a list": (lambda a: (a / MANIFEST).write_bytes(b"[1]"), "is not a manifest"),
    "nested without end": (lambda a: (a / MANIFEST).write_bytes(b"[" * 100_000), "is not a manifest"),
    "no version": (lambda a: change(a, format_version=...), "format_version"),
    "newer version": (lambda a: change(a, format_version=2), r"format version 2; this Pawl reads 1\. .*quantize"),
    "older version": (lambda a: change(a, format_version=0), "format version 0"),
    "version as text": (lambda a: change(a, format_version="1"), "format version 1"),
    "missing field": (lambda a: change(a, name=...), "missing required field `name`"),
    "unknown field": (lambda a: change(a, extra=1), "unknown field `extra`"),
    "unknown field inside": (lambda a: change(a, architecture__depth=1), r"unknown field `depth`.*\$\.architecture"),
    "wrong type": (lambda a: change(a, architecture__num_layers="two"), r"\$\.architecture\.num_layers"),
    "no layers": (lambda a: change(a, architecture__num_layers=0), r">= 1.*\$\.architecture\.num_layers"),
    "unknown cache": (lambda a: change(a, kv_cache="fp8"), r"fp8.*\$\.kv_cache"),
    "unknown target": (lambda a: change(a, target="gpu"), r"gpu.*\$\.target"),
    "bits unheard of": (lambda a: change(a, recipe__default__weight_bits=3), r"3.*\$\.recipe\.default\.weight_bits"),
    "4 bits without groups": (
        lambda a: change(a, recipe__default__weight_bits=4),
        r"weights of 4 bits beside activations of 8, with groups of 0: 4-bit and .* at `\$\.recipe\.default`",
    ),
    "groups of 8 bits": (
        lambda a: change(a, recipe__default__group=32),
        r"weights of 8 bits beside activations of 8, with groups of 32",
    ),
    "weight-only without groups": (
        lambda a: change(a, recipe__default__activation_bits=32),
        r"weights of 8 bits beside activations of 32, with groups of 0",
    ),
    "short digest": (lambda a: change(a, lineage__checkpoint="0" * 63), r"\$\.lineage\.checkpoint"),
    "digest in capitals": (lambda a: change(a, lineage__checkpoint="A" * 64), r"\$\.lineage\.checkpoint"),
    "digest and newline": (lambda a: change(a, lineage__checkpoint="0" * 64 + "\n"), r"\$\.lineage\.checkpoint"),
    "negative size": (lambda a: change_file(a, GRAPH, size_bytes=-1), r">= 0.*\$\.files"),
    "graph not listed": (lambda a: drop_file(a, GRAPH), "does not list model.onnx"),
    "weights not listed": (lambda a: drop_file(a, WEIGHTS), "does not list model.onnx.data"),
    "tokenizer not listed": (lambda a: drop_file(a, TOKENIZER), "does not list tokenizer.json"),
    "file missing": (lambda a: (a / WEIGHTS).unlink(), "model.onnx.data is listed in manifest.json and missing"),
    "listed and never there": (lambda a: change_file(a, "more"), "more is listed in manifest.json and missing"),
    "path outside": (lambda a: change_file(a, "../artifact/more"), "more is listed in manifest.json and missing"),
    "parent": (lambda a: change_file(a, ".."), "is listed in manifest.json and missing"),
    "no name": (lambda a: change_file(a, ""), "is listed in manifest.json and missing"),
    "file not listed": (lambda a: (a / "more").write_bytes(b"x"), "more is not listed in manifest.json; remove it"),
    "folder": (lambda a: (a / "more").mkdir(), "more is a link or not a plain file"),
    "pipe": (lambda a: os.mkfifo(a / "more"), "more is a link or not a plain file"),
    "symbolic link": (lambda a: (a / "more").symlink_to(a / GRAPH), "more is a link or not a plain file"),
    "link in a file's place": (
        lambda a: ((a / GRAPH).rename(a.parent / "elsewhere"), (a / GRAPH).symlink_to(a.parent / "elsewhere")),
        "model.onnx is a link or not a plain file",
    ),
    "dangling link": (lambda a: (a / "more").symlink_to(a / "nothing"), "more is a link or not a plain file"),
    "hard link": (lambda a: (a.parent / "elsewhere").hardlink_to(a / GRAPH), "model.onnx is a link"),
    "truncated": (lambda a: os.truncate(a / WEIGHTS, 999), "model.onnx.data has 999 bytes, not 1000: truncated"),
    "longer": (lambda a: os.truncate(a / WEIGHTS, 1001), "model.onnx.data has 1001 bytes, not 1000"),
    "flipped bit": (lambda a: flip_bit(a / WEIGHTS), "model.onnx.data has SHA-256 .* it was changed"),
    "flipped bit in the tokenizer": (lambda a: flip_bit(a / TOKENIZER), "tokenizer.json has SHA-256"),
    "another digest": (lambda a: change_file(a, GRAPH, sha256="0" * 64), "model.onnx has SHA-256"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused_by_name(artifact: Path, case: str) -> None:
    harm, message = CASES[case]
    harm(artifact)
    with pytest.raises(ManifestError, match=message) as caught:
        load(artifact)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_directory_is_refused(artifact: Path) -> None:
    for path in (artifact / "nothing", artifact / GRAPH):
        with pytest.raises(ManifestError, match="is not an artifact"):
            load(path)


def test_an_artifact_may_be_reached_through_a_link(artifact: Path) -> None:
    link = artifact.parent / "current"
    link.symlink_to(artifact)
    assert load(link) == load(artifact)
