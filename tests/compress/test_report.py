"""The report of a real, tiny artifact: it stands alone, and shows the manifest's figures."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path

import pytest

from compress.figures import NAMES, write
from compress.quantize import Options, quantize
from proto.manifest import REPORT, Manifest, load
from tests.serve.tiny import TEXT, make_checkpoint

NAME = "<tiny> & co"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    make_checkpoint(root / "checkpoint")
    (root / "text.txt").write_text(TEXT * 4)
    options = Options(
        recipe="w4a8",
        name=NAME,
        text=root / "text.txt",
        window=64,
        calibration_windows=4,
        held_out_windows=2,
        force=True,
    )
    quantize(root / "checkpoint", root / "tiny", options, command="made <by> hand", threads=1)
    return root / "tiny"


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return load(artifact)


@pytest.fixture(scope="module")
def page(artifact: Path) -> str:
    return (artifact / REPORT).read_text()


def charts(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_it_is_listed_and_loads_nothing(manifest: Manifest, page: str) -> None:
    assert REPORT in manifest.files
    assert not re.search(r"<(script|link|img|iframe)|\b(src|href)=|url\(|@import|https?:", page)


def test_it_shows_the_manifests_figures(manifest: Manifest, page: str) -> None:
    gate = manifest.gate
    assert gate is not None
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    for figure in NAMES:
        for name in (figure, f"stock_{figure}"):
            assert write(figure, gate.metrics[name]) in cells, name
            if bounds := gate.intervals.get(name):
                assert f"{write(figure, bounds.low)} to {write(figure, bounds.high)}" in cells, name
    for figure, limit in gate.thresholds.items():
        assert write(figure, limit) in cells
    for cost in gate.serving.values():
        assert f"{cost.decode_milliseconds:.2f} ms a token" in cells
    assert gate.machine in unescape(page)
    assert f"{gate.tokens:,} held-out tokens in 2 windows" in page


def test_what_is_out_of_its_limit_is_marked(manifest: Manifest, page: str) -> None:
    gate = manifest.gate
    assert gate is not None
    assert not gate.passed
    assert '<span class="verdict bad">gate FAILED (forced)</span>' in page
    agreement = write("greedy_agreement", gate.metrics["greedy_agreement"])
    assert re.search(rf'<td class="value bad">{re.escape(agreement)}</td>', page)


def test_names_are_escaped(page: str) -> None:
    assert "<title>&lt;tiny&gt; &amp; co · report</title>" in page
    assert "&lt;by&gt; hand" not in page  # by which command and when: the page is the same whenever it is made
    assert "<tiny>" not in page


def test_every_chart_is_there_with_all_it_shows(page: str) -> None:
    drawn = {svg.get("aria-label"): svg for svg in charts(page)}
    assert drawn.keys() == {
        "Change of perplexity by window",
        "Share of greedy answers that are still identical",
        "Histogram of KL divergence",
        "KL divergence by position",
        "Error of each product's output",
        "Precision of each product",
        "Size of each part",
    }
    assert len(list(drawn["Change of perplexity by window"].iter("circle"))) == 2 * 2
    errors = [cell.findtext("title", "") for cell in drawn["Error of each product's output"].iter("rect")]
    assert len(errors) == 2 * 4 + 1
    assert sum(": output " in error for error in errors) == 8
    assert any(error.startswith("head: weight") for error in errors)
    precisions = [cell.findtext("title", "") for cell in drawn["Precision of each product"].iter("rect")]
    assert "layers.1.down: W4A8 rotated" in precisions
    assert "head: W8A8 rotated" in precisions
    sizes = [text.text for text in drawn["Size of each part"].iter("text")]
    assert {"qkv", "o", "gate_up", "down", "head", "other"} <= set(sizes)
