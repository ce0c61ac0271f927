"""What a result says of the machine, and what it does not."""

from __future__ import annotations

import pytest

from bench.machine import without_folders


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('["/home/me/bin/server", "--model", "/data/m.gguf"]', '["server", "--model", "m.gguf"]'),
        ("LD_PRELOAD=/home/me/lib/libx.so", "LD_PRELOAD=libx.so"),
        ("/home/me/venv/bin/python failed with 1: tokens/s", "python failed with 1: tokens/s"),
        ("models/base stays, and so does a / b", "models/base stays, and so does a / b"),
    ],
)
def test_folders_stay_out(text: str, kept: str) -> None:
    assert without_folders(text) == kept
