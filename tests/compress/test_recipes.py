"""Recipes from files: what is written is read, and what is wrong is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint import Checkpoint
from compress.families import Decoder, describe
from compress.precisions import W4A8_GROUP64, W8A8, W8A8_ROTATED
from compress.recipes import make_recipe, write_recipe
from proto.manifest import Recipe
from tests.serve.tiny import make_checkpoint

RECIPE = Recipe(name="mine", default=W4A8_GROUP64, products={"head": W8A8, "layers.1.down": W8A8_ROTATED})


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = tmp_path_factory.mktemp("recipes") / "checkpoint"
    make_checkpoint(directory)
    return describe(Checkpoint(directory))


def test_a_recipe_file_is_read_as_it_was_written(decoder: Decoder, tmp_path: Path) -> None:
    write_recipe(tmp_path / "mine.json", RECIPE)
    assert make_recipe(str(tmp_path / "mine.json"), decoder) == RECIPE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"products": {"layers.7.down": {"weight_bits": 8, "activation_bits": 8}}},
            "names product layers.7.down; there",
        ),
        ({"default": {"weight_bits": 3, "activation_bits": 8}}, "Invalid enum value 3 - at `$.default.weight_bits`"),
        ({"default": {"weight_bits": 4, "activation_bits": 8}}, "weights of 4 bits beside activations of 8"),
        ({"default": {"weight_bits": 8, "activation_bits": 16}}, "gives default W8A16; there are fp32, W8A8"),
        ({"products": {}}, "gives the head 4-bit weights, which are the embedding too: give it 8"),
        ({"speed": "great"}, "unknown field `speed`"),
    ],
)
def test_a_wrong_recipe_is_refused_with_file_value_and_cure(
    change: dict[str, Any], message: str, decoder: Decoder, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    write_recipe(path, RECIPE)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="let `search` write it for this checkpoint") as refused:
        make_recipe(str(path), decoder)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"no JSON", b"\xff", b"[]"])
def test_what_is_no_recipe_is_refused(content: bytes, decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine.json: .*Correct the file"):
        make_recipe(str(tmp_path / "mine.json"), decoder)


def test_a_missing_file_and_an_unknown_name_are_told(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no recipe file .*none.json; `search` writes one"):
        make_recipe(str(tmp_path / "none.json"), decoder)
    with pytest.raises(
        ValueError, match=r"unknown recipe 'int3'; there are .*, w8, w4, fp16, .*, or give a \.json file"
    ):
        make_recipe("int3", decoder)
