"""The peers' packages are exact, and nothing of theirs is taken from another interpreter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.loop import most_tokens
from bench.peers import roster
from bench.peers.loop_process import BLOCK, Options
from bench.row import Load

PINS = sorted(Path(roster.__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("pins", PINS, ids=lambda path: path.stem)
def test_peers_are_pinned_without_what_a_cpu_does_not_need(pins: Path) -> None:
    lines = pins.read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", line)] == []
    assert [line for line in lines if re.match(r"nvidia|cuda|triton|torchvision|torchaudio|torchcodec", line)] == []


def test_every_system_has_a_name_of_its_own() -> None:
    names = [make().name for make in roster.PEERS.values()]
    assert len(set(names)) == len(names)


def test_there_is_room_for_the_longest_and_for_all() -> None:
    longest, most = Load(4000, 64, 1), Load(130, 64, 32)
    options = Options("model", 2, [longest, most], {})
    assert (options.streams, options.context) == (32, 4000 + most_tokens(longest))
    assert options.cache_tokens == 32 * (options.context + BLOCK)
