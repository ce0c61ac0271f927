"""Two artifacts side by side, through the command: the manifests' own figures, differences and what is refused."""

from __future__ import annotations

import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html import unescape
from pathlib import Path

import msgspec
import pytest

from compress.__main__ import EXIT_USAGE, main
from compress.compare import CompareOptions, Comparison, compare
from compress.compare_page import costs_of, rows_of, to_page, to_text
from compress.figures import NAMES, write, write_difference
from compress.quantize import Options, quantize
from compress.scores import FIGURES
from proto.manifest import MANIFEST, TOKENIZER, Manifest, decode, encode, list_files, load

Compare = Callable[..., Comparison]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, text: Path) -> Path:
    """`w8a8` and `w4a8` of one checkpoint."""
    root = tmp_path_factory.mktemp("compare")
    for recipe in ("w8a8", "w4a8"):
        options = Options(
            recipe=recipe,
            text=text,
            window=64,
            calibration_windows=4,
            held_out_windows=2,
            force=True,
            measure=False,
        )
        quantize(checkpoint, root / recipe, options, command="", threads=1)
    return root


@pytest.fixture(scope="module")
def put_beside(artifacts: Path, text: Path) -> Compare:
    def run(first: str = "w8a8", second: str = "w4a8", **options: object) -> Comparison:
        given = CompareOptions(**{"text": text, "window": 64, "held_out_windows": 2, "measure": False, **options})
        return compare(artifacts / first, artifacts / second, given, threads=1)

    return run


def test_figures_are_those_of_the_manifests(put_beside: Compare, artifacts: Path, checkpoint: Path) -> None:
    found = put_beside(reference=checkpoint)
    for recipe in ("w8a8", "w4a8"):
        gate = load(artifacts / recipe).gate
        assert gate is not None
        assert found.figures[recipe].metrics == {name: gate.metrics[name] for name in NAMES}
        assert found.figures[recipe].intervals.items() <= gate.intervals.items()
        assert found.of_reference.metrics.items() <= gate.metrics.items()


def test_differences_are_the_second_less_the_first(put_beside: Compare, checkpoint: Path) -> None:
    found = put_beside(reference=checkpoint)
    first, second = (found.figures[name].metrics for name in ("w8a8", "w4a8"))
    for name, value in found.difference.metrics.items():
        assert value == pytest.approx(second[name] - first[name], rel=1e-3, abs=1e-5), name
    assert found.difference.metrics.keys() == NAMES.keys()
    for name in FIGURES:
        bounds = found.difference.intervals[name]
        assert bounds.low <= found.difference.metrics[name] <= bounds.high
    assert found.difference.intervals["kl"].low > 0  # 4 bits lose more, whatever the text
    turned = put_beside("w4a8", "w8a8", reference=checkpoint).difference.metrics
    assert turned == pytest.approx({name: -value for name, value in found.difference.metrics.items()})


def test_an_artifact_and_its_copy_do_not_differ(put_beside: Compare, artifacts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifacts / "w8a8", tmp_path / "copy")
    found = put_beside("w8a8", str(copy))
    assert set(found.difference.metrics.values()) == {0.0}
    assert {value for bounds in found.difference.intervals.values() for value in (bounds.low, bounds.high)} == {0.0}
    for name in ("w8a8", "copy"):  # and the first is the reference where none is named
        assert found.figures[name].metrics["kl"] == pytest.approx(0, abs=1e-6)
        assert found.figures[name].metrics["greedy_agreement"] == 1
        assert found.figures[name].metrics["identical_share"] == 1


def test_artifacts_of_one_name_are_told_apart(put_beside: Compare, artifacts: Path, tmp_path: Path) -> None:
    other = shutil.copytree(artifacts / "w4a8", tmp_path / "w8a8")
    found = put_beside("w8a8", str(other))
    assert found.figures.keys() == {str(artifacts / "w8a8"), str(other)}


def test_sizes_and_speeds(put_beside: Compare, artifacts: Path) -> None:
    found = put_beside(measure=True)
    costs = {cost.name: cost for cost in costs_of(found)}
    assert {"size of qkv", "size of down", "size of head", "size of all", "1 stream", "16 streams"} <= costs.keys()
    assert float(costs["size of down"].ratio) < 0.75
    assert costs["size of head"].ratio == "1.00"
    whole = (artifacts / "w8a8" / "model.onnx.data").stat().st_size
    assert sum(part.size_bytes for part in found.parts["w8a8"].values()) == pytest.approx(whole, rel=0.2)
    assert costs["16 streams"].first == f"{found.serving['w8a8'].tokens_per_second:.0f} tokens/s"
    assert found.machine in to_text(found)


@pytest.fixture
def command(artifacts: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(first: Path | str, second: Path | str, *flags: object) -> int:
        places = [str(artifacts / first), str(artifacts / second)]
        given = ["--text", text, "--window", 64, "--held-out-windows", 2, "--no-measure", "--threads", 1, *flags]
        monkeypatch.setattr(sys, "argv", ["compress", "compare", *places, *map(str, given)])
        return main()

    return run


def test_the_command_prints_a_table_and_writes_a_page(
    command: Callable[..., int], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert command("w8a8", "w4a8", "--reference", checkpoint, "--output", page) == 0
    shown = capsys.readouterr().out
    assert "against the float32 model, on 126 held-out tokens in 2 windows" in shown
    assert re.search(r"float32 model +w8a8 \(native\) +w4a8 \(native\) +difference +95 % interval", shown)
    assert all(re.search(rf"^{re.escape(name)} .*\d", shown, re.MULTILINE) for name in NAMES.values())
    html = page.read_text()
    assert not re.search(r"<(script|link|img|iframe)|\b(src|href)=|url\(|@import|https?:", html)


def test_the_page_shows_all_figures_and_charts(put_beside: Compare, checkpoint: Path) -> None:
    found = put_beside(reference=checkpoint)
    page = to_page(found)
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    for name in NAMES:
        for recipe in ("w8a8", "w4a8"):
            assert write(name, found.figures[recipe].metrics[name]) in cells
        assert write_difference(name, found.difference.metrics[name]) in cells
    assert all(cost.first in cells and cost.second in cells for cost in costs_of(found))
    assert all(row.bounds in cells for row in rows_of(found))
    drawn = [ET.fromstring(svg).get("aria-label") for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert drawn == [
        "Change of perplexity by window",
        "Share of greedy answers that are still identical",
        "Histogram of KL divergence",
        "KL divergence by position",
    ]


def test_other_tokenizers_are_refused(
    command: Callable[..., int], artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(artifacts / "w8a8", tmp_path / "other"))
    (other / TOKENIZER).write_text((other / TOKENIZER).read_text() + "\n")
    (other / MANIFEST).write_bytes(encode(msgspec.structs.replace(load_unchecked(other), files=list_files(other))))
    assert command("w8a8", other) == EXIT_USAGE
    assert "have different tokenizers" in capsys.readouterr().err


def load_unchecked(artifact: Path) -> Manifest:
    return decode((artifact / MANIFEST).read_bytes())


def test_another_models_checkpoint_is_no_reference(
    command: Callable[..., int], tiny: Callable[..., tuple[object, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("w8a8", "w4a8", "--reference", tiny("llama")[1]) == EXIT_USAGE
    assert "has 160 tokens, and the artifacts 512; give the checkpoint that they were made from" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("second", "flags", "told"),
    [
        ("w8a8", (), "are one artifact; give two"),
        ("w4a8", ("--window", 1000), "--window 1000 is beyond the artifacts' 256 tokens; give less"),
        ("w4a8", ("--held-out-windows", 1), "--held-out-windows 1 is out of range; give at least 2"),
        ("w4a8", ("--held-out-windows", 99), "the held-out text has"),
        (".", (), "is not an artifact"),
        ("w4a8", ("--reference", "."), "is not a checkpoint"),
    ],
)
def test_what_cannot_be_compared_is_told(
    second: str,
    flags: tuple[object, ...],
    told: str,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("w8a8", second, *flags) == EXIT_USAGE
    assert told in capsys.readouterr().err
