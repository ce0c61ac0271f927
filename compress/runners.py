"""The forms of an artifact that run here, each with the runner that will serve it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proto.manifest import NATIVE_GRAPH, Architecture, Form
from serve.block_cache import blocks_for
from serve.device_runner import DeviceRunner
from serve.native import NativeUnavailable, library
from serve.native_runner import NativeRunner
from serve.plan import Runner
from serve.runner import StockRunner, open_session


@dataclass(frozen=True, slots=True)
class Streams:
    """A runner, and the blocks of each of its streams. A stream has room for `capacity` tokens."""

    runner: Runner
    tables: Sequence[Sequence[int]]
    capacity: int


def forms_here(directory: Path) -> list[Form]:
    """The forms that this machine can run, the one that would be served first."""
    if not (directory / NATIVE_GRAPH).exists():
        return ["stock"]
    try:
        library()
    except NativeUnavailable as reason:
        print(f"compress: the native form is left out: {reason}", file=sys.stderr)
        return ["stock"]
    return ["native", "stock"]


def open_streams(
    directory: Path, form: Form, architecture: Architecture, *, streams: int, capacity: int, threads: int
) -> Streams:
    """Open one form of the artifact, with a cache that holds `streams` sequences of `capacity` tokens."""
    if form == "stock":
        session = open_session(directory, threads)
        if "temperature" in {value.name for value in session.get_inputs()}:  # an artifact for CUDA
            device = DeviceRunner(session, architecture, num_slots=streams, capacity=capacity, max_rows=capacity)
            return Streams(device, [[slot] for slot in range(streams)], capacity)
        stock = StockRunner(session, architecture, num_slots=streams, capacity=capacity, max_rows=capacity)
        return Streams(stock, [[slot] for slot in range(streams)], capacity)
    width = blocks_for(capacity)
    session = open_session(directory, threads, NATIVE_GRAPH, library())
    native = NativeRunner(session, architecture, num_blocks=streams * width, capacity=capacity)
    return Streams(native, [range(i * width, (i + 1) * width) for i in range(streams)], capacity)
