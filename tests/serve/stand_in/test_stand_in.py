"""Every family's graphs on ONNX Runtime's own CUDA provider: placed, captured and replayed, by its own rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from compress.checkpoint import Checkpoint
from compress.decoder import build as build_graph
from compress.families import FAMILIES, describe
from compress.recipes import RECIPES_OF, make_recipe
from serve.device_runner import FIELDS, ladder
from tests.compress.conftest import make_model
from tests.serve.stand_in.child import SLOTS
from tests.serve.stand_in.libraries import build

pytestmark = pytest.mark.stand_in
ROOT = Path(__file__).resolve().parents[3]
SITE, HEADERS = ROOT / ".venv/stand-in", ROOT / ".venv/cuda-headers"


def test_every_graph_is_placed_captured_and_replayed_without_a_hidden_copy(tmp_path: Path) -> None:
    folders = []
    for family in FAMILIES:
        for tied in (False, True):
            source = tmp_path / f"{family}-{tied}"
            make_model(family, source, tie_word_embeddings=tied)
            for recipe in RECIPES_OF["cuda"]:
                folder = tmp_path / f"{family}-{tied}-{recipe}"
                folder.mkdir()
                checkpoint = Checkpoint(source)
                made = build_graph(checkpoint, folder, make_recipe(recipe, describe(checkpoint)))
                (folder / "architecture.json").write_bytes(msgspec.json.encode(made))
                folders.append(folder)
    (tmp_path / "libraries").mkdir()
    build(SITE, HEADERS, tmp_path / "libraries")
    paths = {"LD_LIBRARY_PATH": tmp_path / "libraries", "PYTHONPATH": SITE, "STAND_IN_LOG": tmp_path / "log"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.stand_in.child", *folders],
        cwd=ROOT,
        env={**os.environ, **{name: str(path) for name, path in paths.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {folder.name for folder in folders}
    for name, asked in found.items():
        made = [line.split()[:-1] for line in asked["made"]]
        assert made.count(["capture"]) == 2 * len(ladder(SLOTS)), name  # one for each side
        captured = {line[1] for line in made if line[0] == "captured"}
        assert captured <= {"kernel", "move"}, name  # nothing is allocated, nothing comes from the host
        assert "kernel" in captured, name
        step = [line.split() for line in asked["step"]]
        sizes = {kind: [int(line[1]) for line in step if line[0] == kind] for kind in ("upload", "download")}
        assert sizes["upload"] == [len(FIELDS) * SLOTS * 4], name
        assert sorted(sizes["download"]) == [2 * 4, 2 * 4, 2 * 64 * 4, 2 * 64 * 4], name  # sums, guesses, candidates
        assert [line[0] for line in step] == ["upload", "launch", *["download"] * 4, "go", "wait"], name
