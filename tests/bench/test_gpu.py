"""The GPU benchmark on the host: that it runs, and its arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

from bench.gpu import main, shares
from compress.quantize import Options, quantize
from proto.manifest import WEIGHTS, FileEntry
from tests.serve.tiny import TEXT, make_checkpoint
from train.hardware import HARDWARE


def test_both_sides_run_and_the_baseline_is_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    options = Options(target="cuda", text=tmp_path / "text.txt", window=64, calibration_windows=1, held_out_windows=2)
    quantize(tmp_path / "checkpoint", tmp_path / "made", options, command="test", threads=1)
    flags = ["--device", "cpu", "--batches", "1", "3", "--prompt", "8", "--tokens", "4", "--no-compile"]
    places = ["--model", str(tmp_path / "made"), "--checkpoint", str(tmp_path / "checkpoint")]
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *places, *flags, "--out", str(tmp_path / "found.json")])
    main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    rows = found["results"]
    expected = [(system, batch) for batch in (1, 3) for system in ("transformers", "pawl")]
    assert [(row["system"], row["batch"]) for row in rows] == expected
    assert all(row["decode"] > 0 and row["prefill"] > 0 for row in rows)
    assert all("peak_share" not in row for row in rows)  # no listed GPU


def test_shares_of_what_a_gpu_can_do() -> None:
    from tests.serve.fakes import manifest

    weights = FileEntry(sha256="0" * 64, size_bytes=4_800_000_000)
    made = msgspec.structs.replace(manifest(), files={WEIGHTS: weights}, kv_cache="fp16")
    # A thousand steps a second of 4.8 GB, on 4.8 TB/s.
    found = shares(made, 1e9, batch=2, context=0, rate=2000, listed=HARDWARE["h200"])
    assert found == {"bandwidth_share": pytest.approx(1.0), "peak_share": pytest.approx(2e12 / 989e12)}
    more = shares(made, 1e9, batch=2, context=100, rate=2000, listed=HARDWARE["h200"])
    assert more["bandwidth_share"] - 1 == pytest.approx(2 * 100 * made.kv_bytes_per_token / 4.8e9)
