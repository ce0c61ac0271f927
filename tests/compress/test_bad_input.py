"""What the command says of broken input, in one line, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compress.__main__ import EXIT_USAGE
from tests.compress.conftest import SMALL, Run

ROOT = Path(__file__).resolve().parent.parent.parent
WEIGHTS = "model.safetensors"
MIDDLE = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture
def refuse(quantize: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Quantize the copy; gives the line that is said, when nothing else is left."""

    def run(*flags: str) -> str:
        before = {*tmp_path.rglob("*")}
        assert quantize(tmp_path / "out" / "tiny", *flags, source=source) == EXIT_USAGE
        assert {*tmp_path.rglob("*")} - before <= {tmp_path / "out"}
        told = capsys.readouterr().err
        assert told.startswith("compress: ")
        assert told.count("\n") == 1
        return told

    return run


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float, source: Path, refuse: Callable[..., str]) -> None:
    tensors = load_file(source / WEIGHTS)
    tensors[MIDDLE][3, 5] = value
    save_file(tensors, source / WEIGHTS)
    told = refuse("--recipe", "fp32", "--kv", "fp32")
    assert f"1 of the 6,144 values of tensor {MIDDLE} are not finite, such as {value} at [3, 5]. " in told
    assert "Give a checkpoint from before the training diverged" in told


@pytest.mark.parametrize("size", [0, 5, 4000, -1])
def test_a_truncated_weight_file(size: int, source: Path, refuse: Callable[..., str]) -> None:
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:size])
    told = refuse()
    assert "model.safetensors is not a safetensors file or is truncated" in told
    assert "Fetch it again" in told


def test_a_missing_tokenizer(source: Path, refuse: Callable[..., str]) -> None:
    (source / "tokenizer.json").unlink()
    assert "source has no tokenizer.json; save it with a fast tokenizer" in refuse()


def test_a_broken_tokenizer(source: Path, refuse: Callable[..., str]) -> None:
    (source / "tokenizer.json").write_text('{"version"')
    assert "tokenizer.json cannot be read" in (told := refuse())
    assert "Fetch it again" in told


def test_another_models_tokenizer(source: Path, refuse: Callable[..., str]) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"more{i}": 512 + i for i in range(3)}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has 515 tokens, and the model 512: they are not of one model" in refuse()


def test_a_wrong_chat_template(source: Path, refuse: Callable[..., str]) -> None:
    (source / "chat_template.jinja").write_text("{% for m in messages %}")
    assert "the chat template of" in (told := refuse())
    assert "Correct it or remove it" in told


@pytest.mark.parametrize(
    ("documents", "told"),
    [
        (0, "the calibration text has 1 documents of at least 64 tokens, and --calibration-windows asks for 4"),
        (4, "the calibration text has 3 documents of at least 64 tokens, and --calibration-windows asks for 4"),
        (5, "the held-out text has 1 documents of at least 64 tokens, and --held-out-windows asks for 2"),
    ],
)
def test_text_that_is_too_short(documents: int, told: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "short.txt").write_text("word " * (1200 * documents or 200))
    assert told in refuse("--text", str(tmp_path / "short.txt"))


def run_limited(source: Path, output: Path, text: Path, before: Callable[[], None] | None = None) -> str:
    """The real command, in a process that may meet the end of its room; what it said."""
    command = [sys.executable, "-m", "compress", "quantize", source, "-o", output, "--text", text, "--no-measure"]
    done = subprocess.run(
        [*map(str, command), *SMALL], cwd=ROOT, preexec_fn=before, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    return done.stderr


def check_told(told: str, folder: Path, reason: str) -> None:
    (line,) = told.splitlines()
    assert line.startswith(f"compress: {folder} has no room for the artifact ({reason}): ")
    assert line.endswith(" bytes are free. Make room, or name an output elsewhere")


def test_a_file_beyond_the_limit(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    check_told(run_limited(checkpoint, tmp_path / "tiny", text, limit), tmp_path, "File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(tmp_path)])
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        check_told(run_limited(checkpoint, tmp_path / "tiny", text), tmp_path, os.strerror(28))
        assert list(tmp_path.iterdir()) == []
    finally:
        assert run(["umount", str(tmp_path)]).returncode == 0


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
