"""The command, over a tiny checkpoint: what it writes, what it keeps, what it refuses."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from compress import measurements, speeds
from compress.__main__ import EXIT_USAGE, main
from compress.candidates import native_precisions
from compress.gate import EXIT_GATE
from compress.measurements import Measurements, Quality, Timing
from compress.speeds import Speeds
from compress.subject import PIECE, cut
from proto.manifest import NATIVE_GRAPH, Recipe, load
from tests.compress.conftest import SMALL, Run
from tests.serve.tiny import TEXT

LIMIT = 0.03
BUDGET = f"kl<={LIMIT}"
KEY: measurements.Key = {"checkpoint": "a" * 64, "window": 64}


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speeds, "STEPS", 5)
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder with `checkpoint` and `text.txt`."""
    directory = tmp_path_factory.mktemp("search")
    (directory / "checkpoint").symlink_to(checkpoint)
    (directory / "text.txt").write_text(TEXT * 12)
    return directory


def flags_of(room: Path) -> list[object]:
    flags = ["--window", "64", "--calibration-windows", "4", "--validation-windows", "2", "--threads", "2"]
    return [room / "checkpoint", "--text", room / "text.txt", *flags]


@pytest.fixture(scope="module")
def found(room: Path) -> str:
    """What a search says that wrote `size.json`."""
    asked = ["-o", room / "size.json", "--budget", BUDGET, "--objective", "size", "--builds", "2"]
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(sys, "argv", ["compress", "search", *map(str, (*flags_of(room), *asked))])
        assert main() == 0
    return shown.getvalue()


def lines_of(found: str) -> list[str]:
    header, *lines, last = found.splitlines()
    assert header.startswith("recipe ")
    assert "size.json and" in last
    return lines


def test_the_recipe_is_one_that_quantize_takes_and_within_the_budget(
    found: str, room: Path, compress: Run, tmp_path: Path
) -> None:
    (chosen,) = (line for line in lines_of(found) if line.endswith("chosen"))
    assert float(chosen.split()[5]) <= LIMIT
    given = ["--recipe", room / "size.json", "--text", room / "text.txt", "--no-measure", *SMALL, "--gate", "kl<=9"]
    assert compress("quantize", room / "checkpoint", "-o", tmp_path / "it", *given) == 0
    manifest = load(tmp_path / "it")
    assert manifest.recipe == msgspec.json.decode((room / "size.json").read_bytes(), type=Recipe)
    assert manifest.recipe.name == "size"
    assert (tmp_path / "it" / NATIVE_GRAPH).exists()


def test_what_is_chosen_is_no_larger_than_the_hand_made_that_fit(found: str) -> None:
    lines = lines_of(found)
    names = [line.split()[0] for line in lines]
    assert {"w8a8", "w4a8"} < set(names)
    fits = [name for name, line in zip(names, lines, strict=True) if "yes" in line]  # smallest first
    assert lines[names.index(fits[0])].endswith("chosen")
    assert names.index(fits[0]) < names.index("w8a8")


def test_predicted_and_measured_kl_are_near_to_each_other(found: str) -> None:
    """Losses of products add up."""
    for line in lines_of(found):
        predicted, measured = (float(word) for word in line.split()[4:6])
        assert predicted == pytest.approx(measured, rel=0.6)


def test_a_picture_lies_beside_it(found: str, room: Path) -> None:
    assert found
    assert (room / "size.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("found")
def test_another_search_measures_and_builds_nothing_again(
    room: Path, compress: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    for name in ("sensitivity.measure", "speeds.measure", "subject.Subject._judge"):
        monkeypatch.setattr(f"compress.{name}", never)
    asked = ["-o", room / "again.json", "--budget", BUDGET, "--objective", "size", "--builds", "2"]
    assert compress("search", *flags_of(room), *asked) == 0
    first, again = ((room / name).read_text() for name in ("size.json", "again.json"))
    assert again == first.replace('"size"', '"again"')


@pytest.mark.usefixtures("found")
def test_a_budget_that_nothing_meets_writes_no_recipe(
    room: Path, compress: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(room.iterdir())
    budget = "kl<=0.0000001"
    asked = ["-o", room / "none.json", "--builds", "1", "--budget", budget]
    assert compress("search", *flags_of(room), *asked) == EXIT_GATE
    assert f"no recipe is within '{budget}'" in capsys.readouterr().err
    assert sorted(room.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "{room}/recipe.txt"], "recipe.txt is to hold a recipe; give a name that ends in .json"),
        (["-o", "{room}/text.json"], "text.json exists; remove it or name another output"),
        (["-o", "{room}/new.json", "--budget", "speed<=1"], "'speed<=1' is no limit"),
        (["-o", "{room}/new.json", "--budget", "kl<=1e-9"], "'kl<=1e-9' is no limit of kl"),
        (["-o", "{room}/new.json", "--window", "9999"], "--window 9999 is beyond the model's 256 tokens"),
        (["-o", "{room}/new.json", "--validation-windows", "99"], "--validation-windows asks for 99; give longer"),
        (["-o", "{room}/new.json", "--builds", "0"], "--builds 0 is out of range; give at least 1"),
        (["-o", "{room}/new.json", "--threads", "-1"], "--threads -1 is negative"),
        (["-o", "{room}/new.json", "--measurements", "{room}/text.json"], "text.json holds no measurements: "),
    ],
)
def test_wrong_input_is_refused_before_the_work(
    flags: list[str], message: str, room: Path, compress: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (room / "text.json").write_text("no JSON")
    given = [flag.replace("{room}", str(room)) for flag in flags]
    assert compress("search", *flags_of(room), *given) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not (room / "new.json").exists()


def test_measurements_of_something_else_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    precisions = native_precisions()
    timing: measurements.Key = {"checkpoint": "a" * 64, "processor": "this one"}
    speeds_ = Speeds({"latency": [], "throughput": []}, {"latency": 1.0, "throughput": 2.0}, 3)
    Measurements(precisions, Quality(KEY, {"head": [0.1]}), Timing(timing, speeds_)).write(path)
    same = measurements.read(path, precisions, KEY, timing)
    assert same.quality is not None
    assert same.quality.kl == {"head": [0.1]}
    assert same.timing is not None
    other = measurements.read(path, precisions, {**KEY, "checkpoint": "b" * 64}, timing)
    assert (other.quality, other.timing is None) == (None, False)
    elsewhere = measurements.read(path, precisions, KEY, {**timing, "processor": "another"})
    assert (elsewhere.quality is None, elsewhere.timing) == (False, None)
    fewer = measurements.read(path, precisions[1:], KEY, timing)
    assert (fewer.quality, fewer.timing) == (None, None)
    assert [file.name for file in tmp_path.iterdir()] == ["measurements.json"]


@pytest.mark.parametrize(("length", "pieces"), [(64, 1), (PIECE, 1), (2 * PIECE + 5, 2)])
def test_windows_are_cut_into_pieces_of_one_length(length: int, pieces: int) -> None:
    found = cut([list(range(length))] * 3)
    assert len(found) == 3 * pieces
    assert {len(piece) for piece in found} == {min(length, PIECE)}
