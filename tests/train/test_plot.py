from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from train.plot import draw, smoothed
from train.tracker import Tracker, TrackerOptions


@given(st.lists(st.floats(-1e3, 1e3), max_size=400))
def test_smoothing_is_the_mean_of_a_window(values: list[float]) -> None:
    found = smoothed(values)
    assert len(found) == len(values)
    for i, value in enumerate(found):
        half = min(len(values) // 80, i, len(values) - 1 - i)
        window = values[i - half : i + half + 1]
        assert value == pytest.approx(math.fsum(window) / len(window), abs=1e-6)


def written(folder: Path, rows: list[tuple[int, dict[str, float]]]) -> Path:
    tracker = Tracker(folder, TrackerOptions(tracker="none"), steps=10)
    for step, row in rows:
        tracker.log(step, row)
    tracker.close()
    return folder


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """Those of the pictures drawn."""
    made: list[Axes] = []
    subplots = Figure.subplots

    def spy(self: Figure, *args: object, **options: object) -> object:
        found = subplots(self, *args, **options)  # type: ignore[arg-type]
        made.extend(found)
        return found

    monkeypatch.setattr(Figure, "subplots", spy)
    return made


def test_shows_the_losses_over_tokens_and_the_rate(tmp_path: Path, axes: list[Axes]) -> None:
    rows: list[tuple[int, dict[str, float]]] = [
        (step, {"loss": 3.0 if step != 50 else 900.0, "learning_rate": 0.1, "tokens": 10 * step})
        for step in range(1, 101)
    ]
    rows += [(100, {"held_out_loss": 5.0, "tokens": 1000}), (101, {"loss": math.nan, "tokens": 1010})]
    path = draw(written(tmp_path / "my-run", rows))
    assert [file.name for file in sorted(path.parent.iterdir())] == ["curves.png", "metrics.jsonl"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1200, 825)
    losses, rates = axes
    raw, average, held_out = losses.lines
    assert list(raw.get_xdata()) == list(range(10, 1010, 10))
    assert max(raw.get_ydata()) == 900
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([1000], [5.0])
    assert len(average.get_ydata()) == 100
    low, high = losses.get_ylim()
    assert low < 3 < 5 < high < 10  # the spike is out of sight
    assert losses.get_title("left") == "my-run"
    assert rates.get_xlabel() == "tokens"
    assert list(rates.lines[0].get_ydata()) == [0.1] * 100


@pytest.mark.parametrize("rows", [[], [(1, {"loss": 2.0})], [(1, {"loss": 0.0}), (2, {"loss": 0.0})]])
def test_draws_a_run_that_has_hardly_begun(
    rows: list[tuple[int, dict[str, float]]], tmp_path: Path, axes: list[Axes]
) -> None:
    assert draw(written(tmp_path, rows)).exists()
    assert axes[1].get_xlabel() == "steps"
