"""The model streamed layer by layer, against transformers."""

from __future__ import annotations

import numpy as np
import pytest

from compress import section
from compress.checkpoint import Checkpoint
from compress.families import describe
from compress.reference import Reference
from compress.scores import log_softmax
from tests.compress.test_decoder import CASES


@pytest.mark.parametrize("chunk", [512, 11])
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_transformers(case, chunk, tiny, reference, tokens, monkeypatch):
    monkeypatch.setattr(section, "CHUNK", chunk)
    family, overrides = CASES[case]
    model, path = tiny(family, **overrides)
    windows = [tokens, tokens[5:20]]
    checkpoint = Checkpoint(path)
    streamed = Reference(checkpoint, describe(checkpoint), windows, threads=1)
    for number, window in enumerate(windows):
        expected = log_softmax(reference(model, window))
        for start, end in ((0, 4), (4, len(window))):
            found = streamed.log_probabilities(number, start, end)
            np.testing.assert_allclose(found, expected[start:end], rtol=0, atol=1e-3)
