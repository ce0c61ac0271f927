"""The layouts of docs/native.md: element by element, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.packing import (
    drop_rows,
    pack_groups,
    pack_int4,
    pack_int8,
    pad_rows,
    unpack_groups,
    unpack_int4,
    unpack_int8,
)

SIZES = {"rows": st.integers(1, 40), "columns": st.integers(1, 150), "parts": st.integers(1, 3)}
GROUPS = st.sampled_from([32, 64])


def random_integers(low: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(low, high, shape, dtype=np.int8)


@settings(deadline=None)
@given(**SIZES)
def test_int8_weights_come_back(rows: int, columns: int, parts: int) -> None:
    levels = random_integers(-127, 128, parts * rows, columns)
    packed = pack_int8(levels, parts)
    assert packed.shape == (parts * -(-rows // 16), -(-columns // 64) * 16, 16, 4)
    np.testing.assert_array_equal(unpack_int8(packed, levels.shape, parts), levels)
    assert np.abs(packed.astype(int)).sum() == np.abs(levels.astype(int)).sum()  # the padding is zero


@settings(deadline=None)
@given(**SIZES, group=GROUPS)
def test_4_bit_weights_come_back_and_their_padding_weighs_nothing(
    rows: int, columns: int, parts: int, group: int
) -> None:
    levels = random_integers(0, 16, parts * rows, columns).astype(np.uint8)
    zero = random_integers(0, 16, parts * rows, -(-columns // group)).astype(np.uint8)
    packed = pack_int4(levels, zero, group, parts)
    assert packed.shape == (parts * -(-rows // 16), -(-columns // 64) * 8, 16, 4)
    np.testing.assert_array_equal(unpack_int4(packed, levels.shape, parts), levels)
    zeros = pack_groups(zero, columns, group, parts)
    np.testing.assert_array_equal(unpack_groups(zeros, levels.shape, group, parts), zero)
    whole = (len(packed) * 16, packed.shape[1] * 8)  # rows and columns with their padding
    offset = unpack_int4(packed, whole).astype(int) - np.repeat(unpack_groups(zeros, whole, group), group, axis=1)
    exact = levels.astype(int) - np.repeat(zero, group, axis=1)[:, :columns]
    assert np.abs(offset).sum() == np.abs(exact).sum()


@settings(deadline=None)
@given(rows=SIZES["rows"], parts=SIZES["parts"])
def test_rows_come_back(rows: int, parts: int) -> None:
    values = random_integers(0, 99, parts * rows)
    padded = pad_rows(values, parts, fill=7)
    assert len(padded) == parts * -(-rows // 16) * 16
    np.testing.assert_array_equal(drop_rows(padded, len(values), parts), values)
    assert (padded == 7).sum() == (values == 7).sum() + len(padded) - len(values)


@pytest.mark.parametrize(("n", "k"), [(0, 0), (17, 66), (33, 3), (47, 127)])
def test_an_element_is_where_the_document_says(n: int, k: int) -> None:
    levels = random_integers(0, 16, 48, 128)
    assert pack_int8(levels)[n // 16, k // 4, n % 16, k % 4] == levels[n, k]
    byte = pack_int4(levels.astype(np.uint8), np.zeros((48, 4), np.uint8), 32)[n // 16, k // 8, n % 16, k % 8 // 2]
    assert (byte >> 4 if k % 2 else byte & 15) == levels[n, k]
    scales = random_integers(0, 99, 48, 4)
    assert pack_groups(scales, 128, 32)[n // 16, k // 32, n % 16] == scales[n, k // 32]


def test_fused_products_are_padded_each_by_itself() -> None:
    levels = random_integers(1, 99, 2 * 20, 64)  # gate rows, then up rows
    packed = pack_int8(levels, parts=2)
    np.testing.assert_array_equal(unpack_int8(packed[:2], (20, 64)), levels[:20])
    np.testing.assert_array_equal(unpack_int8(packed[2:], (20, 64)), levels[20:])
