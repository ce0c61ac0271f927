from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.errors import TrainError
from train.tracker import METRICS_FILE, Tracker, TrackerOptions, read_metrics


class FakeMLflow(types.ModuleType):
    """The calls of mlflow 3 that are used, with its rule that a run's settings never change."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []

    def set_experiment(self, experiment_name: str) -> None:
        self.calls.append(("experiment", experiment_name))

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        self.calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "abc"))

    def log_params(self, params: dict[str, Any]) -> None:
        self.calls.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("metrics", step, metrics))

    def end_run(self, status: str = "FINISHED") -> None:
        self.calls.append(("end", status))


class FakeWandb(types.ModuleType):
    """The calls of wandb 0.2x and 0.3x that are used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[Any, ...]] = []

    def init(
        self, *, project: str, name: str, dir: str, config: dict[str, Any], id: str | None, resume: str
    ) -> FakeWandb:
        self.calls.append(("init", project, name, dir, config, id, resume))
        self.id = id or "xyz"
        return self

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.calls.append(("finish", exit_code))


def tracker(folder: Path, name: str = "none", **settings: Any) -> Tracker:
    return Tracker(folder, TrackerOptions(tracker=name), **{"steps": 10, "settings": {"rate": 0.1}} | settings)


def log(made: Tracker, *steps: int) -> None:
    for step in steps:
        made.log(step, {"loss": 1 / step})


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    log(first, 1, 2, 3, 4)
    first.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    second = tracker(tmp_path, start=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    log(second, 3, 4, 5)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]  # before it is closed
    second.close()
    fresh = tracker(tmp_path)
    fresh.close()
    assert read_metrics(tmp_path) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    made = tracker(tmp_path)
    made.log(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    made.close()
    text = (tmp_path / METRICS_FILE).read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "tokens": 5}\n'


def test_who_does_not_lead_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tracker(tmp_path / "run", "mlflow", leads=False)
    log(made, 1)
    made.show(1, loss=1.0, tokens_per_second=5, mfu=0.1)
    made.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = tracker(tmp_path)  # stderr is no terminal here
    made.show(3, loss=1.0, tokens_per_second=5, mfu=0.1)
    made.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    made = tracker(tmp_path, start=2)
    made.show(9, loss=2.3456, tokens_per_second=12345, mfu=0.314)
    made.close()
    shown = capsys.readouterr().err
    assert "9/10" in shown
    assert "loss 2.346, 12,345 tokens/s, MFU 31%" in shown


def test_tensorboard_hides_what_is_repeated(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = tracker(tmp_path, "tensorboard")
    log(first, 1, 2, 3, 4)
    first.close()
    second = tracker(tmp_path, "tensorboard", start=2)
    second.log(3, {"loss": 9.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert "settings/text_summary" in events.Tags()["tensors"]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    folder = tmp_path / "my-run"
    made = tracker(folder, "mlflow")
    made.log(1, {"loss": 0.5, "grad_norm": math.nan})
    made.close()
    resumed = tracker(folder, "mlflow", start=1)
    log(resumed, 2)
    resumed.close(failed=True)
    assert mlflow.calls == [
        ("experiment", "pawl"),
        ("start", None, "my-run"),
        ("params", {"rate": 0.1}),
        ("metrics", 1, {"loss": 0.5}),
        ("end", "FINISHED"),
        ("experiment", "pawl"),
        ("start", "abc", None),
        ("metrics", 2, {"loss": 0.5}),
        ("end", "FAILED"),
    ]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "my-run"
    for start in (0, 1):
        made = tracker(folder, "wandb", start=start)
        log(made, start + 1)
        made.close(failed=bool(start))
    settings = ("pawl", "my-run", str(folder), {"rate": 0.1})
    assert wandb.calls == [
        ("init", *settings, None, "allow"),
        ("log", 1, {"loss": 1.0}),
        ("finish", 0),
        ("init", *settings, "xyz", "allow"),
        ("log", 2, {"loss": 0.5}),
        ("finish", 1),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrainError, match=f"pip install {name}"):
        tracker(tmp_path, name)


def test_a_server_that_is_gone_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)

    def gone(metrics: dict[str, float], step: int) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(mlflow, "log_metrics", gone)
    made = tracker(tmp_path, "mlflow")
    log(made, 1, 2)
    made.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    error = capsys.readouterr().err
    assert error.count("tracker: stopped at step 1, metrics.jsonl goes on: no route to host") == 1


def test_the_file_is_json_a_line(tmp_path: Path) -> None:
    made = tracker(tmp_path)
    log(made, 1, 2)
    made.close()
    loads: Callable[[str], Any] = json.loads
    assert [loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == read_metrics(tmp_path)
