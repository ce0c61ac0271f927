"""The table of formats: its figures against what they must be, and a line for those that cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from bench import compression
from bench.compression import KINDS, OTHERS, Result, Rows, document, judge, table
from bench.contestants import BitsAndBytes, Windows
from compress.checkpoint import Checkpoint, Floats
from compress.families import describe
from compress.reference import Reference
from compress.scores import log_softmax, score_rows
from tests.serve.tiny import VOCABULARY, make_checkpoint

WINDOWS = [list(range(5, 70)), list(range(200, 265))]


class Noisy:
    """Reads as the reference does, but for noise; `broken` cannot be made ready."""

    name = "noisy"

    def __init__(self, expected: Sequence[Floats], noise: float, broken: str = "") -> None:
        self.expected = expected
        self.noise = noise
        self.broken = broken

    def prepare(self) -> None:
        if self.broken:
            raise OSError(self.broken)

    def size_bytes(self) -> int:
        return round(1e6 / (1 + self.noise))

    def log_probabilities(self, windows: Windows) -> Iterator[Floats]:
        random = np.random.default_rng(0)
        for rows in self.expected:
            yield log_softmax(rows + np.float32(self.noise) * random.normal(size=rows.shape).astype(np.float32))

    def speeds(self) -> tuple[float, float]:
        return 10.0, 160.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compression") / "checkpoint"
    make_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Rows:
    found = Checkpoint(checkpoint)
    return Rows(Reference(found, describe(found), WINDOWS, threads=1), WINDOWS)


def run(contestant: compression.Contestant, expected: Rows, *, timed: bool = True) -> Result:
    exact = [score_rows(rows, rows, np.asarray(window[1:])) for rows, window in zip(expected, WINDOWS, strict=True)]
    return judge(contestant, WINDOWS, expected, exact, timed)


def test_rows_are_the_references_by_window(expected: Rows) -> None:
    assert [rows.shape for rows in expected] == [(64, VOCABULARY)] * 2
    np.testing.assert_allclose(np.exp(expected[1]).sum(-1), 1, rtol=1e-4)


def test_figures_are_against_the_reference(expected: Rows) -> None:
    same, near, far = (run(Noisy(expected, noise), expected) for noise in (0.0, 0.1, 0.5))
    for found, changed in ((same, False), (near, True)):
        assert found.figures is not None
        assert (abs(found.figures.metrics["kl"]) > 1e-4) == changed
    assert same.figures is not None
    assert near.figures is not None
    assert far.figures is not None
    assert same.figures.metrics["greedy_agreement"] == 1
    assert same.figures.metrics["perplexity_ratio"] == pytest.approx(1)
    assert near.figures.metrics["kl"] == pytest.approx(0.1**2 / 2, rel=0.2)
    assert far.figures.metrics["kl"] > 10 * near.figures.metrics["kl"]


def test_the_table_goes_by_size_and_says_what_flatters_whom(expected: Rows) -> None:
    results = [run(Noisy(expected, noise), expected) for noise in (0.5, 0.0)]
    results.append(run(Noisy(expected, 0.0, "/some/folder/file is missing"), expected))
    lines = table(results, 3.0).splitlines()
    assert lines[0].split() == " ".join(compression.HEAD).split()
    assert lines[1].split() == ["float32", "3.000"]
    assert [line.split()[1] for line in lines[2:4]] == ["1.0", "0.7"]
    assert lines[2].split()[-2:] == ["10", "160"]
    assert lines[4] == "noisy: file is missing"
    assert "Q4_1" in lines[5]
    assert "flatters 4-bit blocks" in lines[5]


def test_the_document_has_what_the_table_shows(expected: Rows) -> None:
    found = document(run(Noisy(expected, 0.1), expected))
    assert {"system", "size_bytes", "perplexity", "kl", "kl_interval", "greedy_agreement"} <= found.keys()
    assert (found["tokens_per_second_1"], found["tokens_per_second_16"]) == (10.0, 160.0)
    untimed = document(run(Noisy(expected, 0.1), expected, timed=False))
    assert "tokens_per_second_1" not in untimed
    assert document(run(Noisy(expected, 0.1, "gone"), expected)) == {"system": "noisy", "problem": "gone"}


@pytest.mark.filterwarnings("ignore:.*inputs will be cast:UserWarning")
def test_bitsandbytes_rows(checkpoint: Path, expected: Rows, tmp_path: Path) -> None:
    """With the kernels of this processor: both formats, one much nearer than the other."""
    eight, four = (run(BitsAndBytes(checkpoint, form, tmp_path, 1), expected) for form in OTHERS["bitsandbytes"])
    assert (eight.name, four.name) == ("bitsandbytes LLM.int8()", "bitsandbytes NF4")
    assert eight.figures is not None, eight.problem
    assert four.figures is not None, four.problem
    assert 0 < 10 * eight.figures.metrics["kl"] < four.figures.metrics["kl"]
    assert four.size_bytes < eight.size_bytes < (checkpoint / "model.safetensors").stat().st_size
    assert eight.speeds is None


def test_bitsandbytes_without_kernels_is_a_line(
    checkpoint: Path, expected: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no kernels for this device")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    found = run(BitsAndBytes(checkpoint, "nf4", tmp_path, 1), expected)
    assert found.figures is None
    assert "cannot be loaded as a decoder: no kernels for this device" in found.problem


def test_every_kind_has_a_class_and_every_form_a_name(checkpoint: Path, tmp_path: Path) -> None:
    assert KINDS.keys() == OTHERS.keys()
    names = [KINDS[kind](checkpoint, form, tmp_path, 1).name for kind in OTHERS for form in OTHERS[kind]]
    assert len(set(names)) == len(names) == 10
