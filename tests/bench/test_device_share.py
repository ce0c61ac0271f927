"""How busy a device is kept: that a simulated one is driven by real clients, and what nvidia-smi says is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import device_share
from bench.device_share import Utilization, main
from bench.simulated_device import SimulatedRunner
from serve.plan import Plan
from tests.serve.tiny import make_artifact


def test_the_server_drives_a_simulated_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_artifact(tmp_path)
    monkeypatch.setattr("bench.load.TOKEN_IDS", range(20, 400))  # of the tiny model
    load = ["--concurrency", "3", "--input-len", "4", "--output-len", "30", "--steps-ms", "2"]
    monkeypatch.setattr(sys, "argv", ["bench", "--model", str(artifact), *load, "--out", str(tmp_path / "found")])
    main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "found").read_text())
    assert [(row["step_ms"], row["runs"]) for row in found["results"]] == [(2, "waits"), (2, "ahead")]
    for row in found["results"]:
        assert (row["completed"], row["failed"], row["total_output_tokens"]) == (6, 0, 180)
        assert 0 < row["busy"] < 1.000001


def test_the_simulated_device_does_one_thing_after_the_other() -> None:
    runner = SimulatedRunner(0.02, num_slots=1, vocab_size=10)
    plan = Plan()
    plan.add([0], 0, [1])
    landed = [runner.launch(plan) for _ in range(3)]
    assert [len(results().rows) for results in landed] == [1, 1, 1]
    found = runner.document()
    assert found["busy"] == pytest.approx(1)  # of the time between the first launch's end and the last's


def test_what_nvidia_smi_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "nvidia-smi"
    said = tmp_path / "said"
    lines = ("#!/bin/sh", 'printf "0\\n91\\n93\\n95\\n0\\n"', f'echo "$@" >{said}', "exec sleep 60")
    stand_in.write_text("\n".join(lines))
    stand_in.chmod(0o755)
    monkeypatch.setattr(device_share, "QUERY", (str(stand_in), *device_share.QUERY[1:]))
    with Utilization(2) as utilization:
        while not said.exists():
            pass
    assert utilization.samples == [0, 91, 93, 95, 0]
    assert utilization.busy == 0.91
    assert said.read_text().startswith("--query-gpu=utilization.gpu --format=csv,noheader,nounits --id=2 ")
