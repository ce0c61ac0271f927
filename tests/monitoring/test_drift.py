"""Drift: found where it is, not found where chance alone is at work, and told to people and to Prometheus."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.snapshot import Snapshot, snapshot
from monitoring.__main__ import EXIT_DRIFTED, EXIT_USAGE, main
from monitoring.drift import Drift, categories_drift, compare, numbers_drift, psi, rate_drift, wilson
from monitoring.window import REFUSAL, Window, WindowError, read_window
from serve.store import open_store
from tests.deploy.judged import interaction, judge

ENGLISH = "Could you please tell me how many grains of rice lie on the last square of the board?"
GERMAN = "Kannst du mir bitte sagen, wie viele Reiskörner auf dem letzten Feld des Brettes liegen?"


def test_psi_by_hand() -> None:
    expected = (0.3 - 0.5) * np.log(0.3 / 0.5) + (0.7 - 0.5) * np.log(0.7 / 0.5)
    assert psi(np.array([50.0, 50.0]), np.array([30.0, 70.0])) == pytest.approx(expected)
    assert psi(np.array([10.0, 0.0]), np.array([20.0, 0.0])) == pytest.approx(0, abs=0.02)


def test_wilson_as_published() -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263; method 10 of 17:873 on 56/70 and 48/80."""
    assert wilson(81, 263) == pytest.approx((0.3080, 0.2553, 0.3662), abs=1e-4)
    drift = rate_drift("x", [True] * 48 + [False] * 32, [True] * 56 + [False] * 14)
    assert (drift.distance, drift.low, drift.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize("count", [30, 300])
def test_chance_alone_is_no_drift(count: int) -> None:
    found = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        found += numbers_drift("x", draw.geometric(0.02, 300).tolist(), draw.geometric(0.02, count).tolist()).drifted
        found += rate_drift("x", (draw.random(300) < 0.3).tolist(), (draw.random(count) < 0.3).tolist()).drifted
    assert found <= 6  # of 80, at 5 %


def test_what_moves_is_found() -> None:
    draw = np.random.default_rng(0)
    assert numbers_drift("x", draw.normal(100, 10, 200).tolist(), draw.normal(110, 10, 200).tolist()).drifted
    assert categories_drift("x", ["en"] * 95 + ["de"] * 5, ["en"] * 60 + ["de"] * 40).drifted
    assert not categories_drift("x", ["en"] * 95 + ["de"] * 5, ["en"] * 91 + ["de"] * 9).drifted
    assert rate_drift("x", [True] * 5 + [False] * 95, [True] * 25 + [False] * 75).drifted
    assert not rate_drift("x", [True, False], [True, True]).drifted  # too few to tell


def test_values_that_are_all_the_same() -> None:
    drift = numbers_drift("x", [7] * 50, [7] * 50)
    assert (drift.distance, drift.drifted) == (0, False)
    assert numbers_drift("x", [7] * 50, [8] * 50).drifted
    assert numbers_drift("x", [7] * 50, [6] * 50).drifted
    assert not numbers_drift("x", [7] * 50, [7] * 50).drifted


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I cannot help with that.", True),
        ("I can’t do this.", True),
        ("As an AI, I have no opinion.", True),
        ("**Unfortunately, I** do not know.", True),
        ("Sorry is a word of regret.", False),
        ("The cat cannot sleep. I'm sorry.", False),
    ],
)
def test_refusals(answer: str, refuses: bool) -> None:
    assert bool(REFUSAL.match(answer)) == refuses


def keep(folder: Path, prompts: list[str], **fields: Any) -> Path:
    """A snapshot of chats that nobody judged, but for the first, which gets a thumb."""
    store = open_store(str(folder / "records.sqlite"))
    store.open()
    draw = random.Random(len(prompts[0]))
    chats = [
        interaction(messages=[{"role": "user", "content": prompt}], prompt_tokens=draw.randint(20, 40), **fields)
        for prompt in prompts
    ]
    store.append([*chats])
    store.append([judge(True, of=chats[0]).feedback])
    store.close()
    snapshot(Snapshot(output=folder / "snapshot", records=str(folder / "records.sqlite"), unjudged=True))
    return folder / "snapshot"


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same length of prompts; another language, and answers that refuse and were cut."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    before = keep(folder / "a", [ENGLISH] * 60, mean_logprob=-0.5)
    now: dict[str, Any] = {"completion": "I cannot answer that.", "finish_reason": "length", "mean_logprob": -1.5}
    now |= {"created": "2026-11-22T12:00:00.000Z"}
    return before, keep(folder / "b", [GERMAN] * 60, **now)


def test_two_snapshots(windows: tuple[Path, Path]) -> None:
    drifts = {drift.figure: drift for drift in compare(*map(read_window, windows))}
    drifted = {name for name, drift in drifts.items() if drift.drifted}
    assert drifted == {"mean_logprob", "language", "refusals", "truncated_answers"}
    assert {bar.label: (bar.reference, bar.current) for bar in drifts["language"].bars} == {"en": (1, 0), "de": (0, 1)}
    assert drifts["feedback_coverage"].current == pytest.approx(1 / 60)
    assert drifts["thumbs_up"].current == 1


def test_windows_by_date(windows: tuple[Path, Path]) -> None:
    assert len(read_window(windows[1], since="2026-11-22")) == 60
    assert len(read_window(windows[1], until="2026-11-22T14:00+02:00")) == 0
    with pytest.raises(WindowError, match="'yesterday' is not a date"):
        read_window(windows[1], since="yesterday")


def test_texts_that_are_gone(tmp_path: Path) -> None:
    window = read_window(keep(tmp_path, [ENGLISH] * 3, completion=None))
    assert (len(window), window.refusals, window.empty) == (3, [], [])
    assert "refusals" not in {drift.figure for drift in compare(window, window)}


def test_the_command(
    windows: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, gauges = tmp_path / "drift.html", tmp_path / "drift.prom"

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["monitoring", "drift", *map(str, words)])
        return main()

    assert call(*windows, "--html", page, "--textfile", gauges) == EXIT_DRIFTED
    assert "refusals" in capsys.readouterr().out
    assert "Drifted: mean_logprob, language, refusals, truncated_answers." in page.read_text()
    assert page.read_text().count("<svg") == 4
    families = {family.name: family.samples for family in text_string_to_metric_families(gauges.read_text())}
    drifted = {sample.labels["figure"]: sample.value for sample in families["pawl_drift_drifted"]}
    assert (drifted["refusals"], drifted["prompt_tokens"]) == (1, 0)
    assert call(windows[0], windows[0]) == 0
    assert call(tmp_path, windows[0]) == EXIT_USAGE
    assert "is no snapshot" in capsys.readouterr().err
    assert call(*windows, "--current-since", "2027-01-01") == EXIT_USAGE


def test_a_window_without_values_is_left_out() -> None:
    empty: Window = Window([1], [1], [], [], [], [], [False], [False], [False], [])
    found: list[Drift] = compare(empty, empty)
    assert {drift.figure for drift in found} == {
        "prompt_tokens",
        "completion_tokens",
        "truncated_answers",
        "broken_off",
        "feedback_coverage",
    }
