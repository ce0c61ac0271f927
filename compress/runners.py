"""The forms of an artifact that run here, each with the runner that will serve it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proto.manifest import GRAPH, NATIVE_GRAPH, Architecture, Form
from serve.block_cache import blocks_for
from serve.device_runner import DeviceRunner
from serve.device_session import open_device_session
from serve.device_stream import HOST, Device
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
    directory: Path,
    form: Form,
    architecture: Architecture,
    *,
    streams: int,
    capacity: int,
    threads: int,
    device: Device = HOST,
) -> Streams:
    """Open one form of the artifact, with a cache that holds `streams` sequences of `capacity` tokens.

    `device` is for an artifact for CUDA, which runs on the host too. Raises DeviceUnavailable.
    """
    if form == "stock":
        sizes = {"num_slots": streams, "capacity": capacity, "max_rows": capacity}
        slots = [[slot] for slot in range(streams)]
        if device != HOST:
            on_device = open_device_session(directory / GRAPH, device)
            return Streams(DeviceRunner(on_device, architecture, **sizes, stream=on_device.stream), slots, capacity)
        session = open_session(directory, threads)
        for_cuda = "temperature" in {value.name for value in session.get_inputs()}
        make: Callable[..., Runner] = DeviceRunner if for_cuda else StockRunner
        return Streams(make(session, architecture, **sizes), slots, capacity)
    width = blocks_for(capacity)
    session = open_session(directory, threads, NATIVE_GRAPH, library())
    native = NativeRunner(session, architecture, num_blocks=streams * width, capacity=capacity)
    return Streams(native, [range(i * width, (i + 1) * width) for i in range(streams)], capacity)
