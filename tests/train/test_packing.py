from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import packing
from train.errors import TrainError
from train.packing import Rows, pack

CAPACITY = 64
lengths_of_sequences = st.lists(st.integers(1, CAPACITY), max_size=200)


def best_fit_by_search(lengths: list[int], capacity: int) -> int:
    """Rows that best fit decreasing needs, told simply."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


def first_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in lengths:
        for row, room in enumerate(rooms):
            if room >= length:
                rooms[row] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


def check(rows: Rows, lengths: np.ndarray, capacity: int) -> None:
    assert sorted(sequence for row in range(len(rows)) for sequence in rows[row].tolist()) == list(range(len(lengths)))
    filled = [int(lengths[rows[row]].sum()) for row in range(len(rows))]
    assert all(0 < tokens <= capacity for tokens in filled)


@settings(deadline=None)
@given(lengths_of_sequences)
def test_every_sequence_is_in_one_row_and_no_row_is_over_full(lengths: list[int]) -> None:
    rows = pack(lengths, CAPACITY)
    check(rows, np.array(lengths, np.int64), CAPACITY)
    assert len(rows) == best_fit_by_search(lengths, CAPACITY)
    again = pack(np.array(lengths), CAPACITY)
    assert np.array_equal(rows.order, again.order)
    assert np.array_equal(rows.starts, again.starts)


@pytest.mark.parametrize("seed", range(5))
def test_fewer_rows_than_first_fit(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, CAPACITY + 1, 500)
    assert len(pack(lengths, CAPACITY)) < first_fit(lengths.tolist(), CAPACITY)


def test_rows_are_full_for_lengths_as_they_are_in_documents() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(int) + 1, 1, 2048)
    rows = pack(lengths, 2048)
    check(rows, lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.995


def test_blocks_are_packed_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 100)
    lengths = np.random.default_rng(0).integers(1, CAPACITY + 1, 250)
    rows = pack(lengths, CAPACITY)
    check(rows, lengths, CAPACITY)
    assert len({int(sequence) // 100 for sequence in rows[0]}) == 1
    assert len(rows) == sum(len(pack(lengths[start : start + 100], CAPACITY)) for start in (0, 100, 200))


def test_a_sequence_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(TrainError, match="65 tokens is longer than a row of 64"):
        pack([3, 65], CAPACITY)
