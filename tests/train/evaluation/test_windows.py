"""Windows: each token is foretold once, with the context that the stride promises."""

from __future__ import annotations

import itertools

import pytest

from train.errors import TrainError
from train.evaluation.windows import Window, cut, window_shape


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_each_token_is_foretold_once_in_order_and_with_its_context(stride: int) -> None:
    for start, num_tokens in itertools.product(range(32), range(41)):
        tokens = list(range(num_tokens))
        windows = cut(tokens, start, 8, stride)
        foretold = [token for window in windows for token in window.tokens[window.first :]]
        assert foretold == tokens[max(start, 1) :]
        for number, window in enumerate(windows):
            assert 1 <= window.first < len(window.tokens) <= 8
            assert window.tokens == list(range(window.tokens[0], window.tokens[-1] + 1))
            if number:
                assert window.first == 8 - stride
            elif window.tokens[0]:
                assert len(window.tokens) == 8  # what is long before an answer fills its first window


def test_the_usual_windows_touch_in_one_token() -> None:
    assert cut([0, 1, 2, 3, 4, 5, 6], 0, 4, 3) == [Window([0, 1, 2, 3], 1), Window([3, 4, 5, 6], 1)]


def test_the_shape_is_the_context_unless_asked_for() -> None:
    assert window_shape(0, 0, 512) == (512, 511)
    assert window_shape(0, 0, 131072) == (2048, 2047)
    assert window_shape(64, 16, 512) == (64, 16)
    with pytest.raises(TrainError, match="--window 513 is beyond the target's context of 512"):
        window_shape(513, 0, 512)
    with pytest.raises(TrainError, match="--stride 512 must be below the window's 512"):
        window_shape(0, 512, 512)
