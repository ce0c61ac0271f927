from __future__ import annotations

import pytest
import torch

from train.peak import SIDE, listed_as, measure_peak, peak_of


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


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_found_in_the_list_by_its_name(name: str, listed: str | None) -> None:
    assert listed_as(name) == listed


def test_the_makers_peak_is_taken_for_a_listed_gpu_and_others_are_measured(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("train.peak.measure_peak", lambda device, dtype: 7.0)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert peak_of(gpu, torch.bfloat16) == (989e12, "the maker's for NVIDIA H200")
    assert peak_of(gpu, torch.float32) == (7.0, "measured")
    assert peak_of(cpu, torch.bfloat16) == (7.0, "measured")
