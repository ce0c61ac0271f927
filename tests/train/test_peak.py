from __future__ import annotations

import torch

from train.peak import SIDE, measure_peak


def test_counts_the_operations_of_the_fastest_product(monkeypatch) -> None:
    monkeypatch.setitem(SIDE, "cpu", 64)
    times = iter([0.0, 0.0, 0.02, 0.1, 0.105, 0.2, 0.29, 0.4])  # the deadline, then start and end of each product
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert round(measure_peak(torch.device("cpu"), torch.float32)) == round(2 * 64**3 / 0.005)


def test_one_product_at_least(monkeypatch) -> None:
    monkeypatch.setitem(SIDE, "cpu", 8)
    times = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert measure_peak(torch.device("cpu"), torch.float64) == 2 * 8**3 / 2.0
