"""The forms in which an artifact can run, and which one it is: here alone do they differ.

A form opens the graph and makes a runner and a scheduler that fit each other. Nobody behind them asks which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from proto.manifest import GRAPH, NATIVE_GRAPH, Manifest
from serve.block_cache import BLOCK, BlockCache
from serve.cache import Cache
from serve.choices import Block, Choices, SettingsError
from serve.device_runner import DeviceRunner
from serve.device_session import DeviceSession, DeviceUnavailable, open_device_session
from serve.device_stream import HOST, Device
from serve.native import NativeUnavailable, instruction_set, library
from serve.native_runner import NativeRunner, block_shape
from serve.plan import Runner
from serve.runner import StockRunner, open_session
from serve.scheduler import Scheduler
from serve.settings import Settings
from serve.slot_cache import SlotCache


class Form(Protocol):
    @property
    def phrase(self) -> str:
        """For the ready line: which form, and why."""

    @property
    def shares(self) -> bool:
        """Whether requests take blocks as they need them, so that more can run than would fit at full length."""

    @property
    def max_slots(self) -> int:
        """More requests at once would slow each one down without more tokens in total."""

    def block(self, manifest: Manifest, max_context: int) -> Block:
        """What the cache is made of, for requests of `max_context` tokens."""

    def open(self, directory: Path, threads: int) -> ort.InferenceSession: ...

    def build(
        self, session: ort.InferenceSession, manifest: Manifest, settings: Settings, choices: Choices
    ) -> tuple[Runner, Scheduler]: ...


@dataclass(frozen=True, slots=True)
class StockForm:
    """The portable graph: a block is a slot, which holds a whole request."""

    phrase: str
    shares: bool = False
    max_slots: int = 32
    prefill_chunk: int = 128  # tokens; others wait for a whole chunk

    def block(self, manifest: Manifest, max_context: int) -> Block:
        return Block(max_context, max_context * manifest.kv_bytes_per_token, manifest.kv_cache)

    def open(self, directory: Path, threads: int) -> ort.InferenceSession:
        return open_session(directory, threads)

    def build(
        self, session: ort.InferenceSession, manifest: Manifest, settings: Settings, choices: Choices
    ) -> tuple[Runner, Scheduler]:
        chunk = settings.prefill_chunk or self.prefill_chunk
        slots, capacity = choices.num_slots, choices.max_context
        runner = StockRunner(session, manifest.architecture, num_slots=slots, capacity=capacity, max_rows=chunk)
        return runner, make_scheduler(runner, SlotCache(slots, capacity, chunk), settings, choices, chunk)


@dataclass(frozen=True, slots=True)
class NativeForm:
    """The graph on our operators, from their library."""

    phrase: str
    library: Path
    shares: bool = True
    max_slots: int = 32
    prefill_chunk: int = 512  # tokens; while others decode, `itl_limit` cuts it short

    def block(self, manifest: Manifest, max_context: int) -> Block:
        layers, kv_heads, size = block_shape(manifest.architecture)
        return Block(BLOCK, layers * kv_heads * size, "int8")

    def open(self, directory: Path, threads: int) -> ort.InferenceSession:
        return open_session(directory, threads, NATIVE_GRAPH, self.library)

    def build(
        self, session: ort.InferenceSession, manifest: Manifest, settings: Settings, choices: Choices
    ) -> tuple[Runner, Scheduler]:
        blocks, capacity = choices.num_blocks, choices.max_context
        runner = NativeRunner(session, manifest.architecture, num_blocks=blocks, capacity=capacity)
        chunk = settings.prefill_chunk or self.prefill_chunk
        return runner, make_scheduler(runner, BlockCache(blocks, capacity), settings, choices, chunk)


@dataclass(frozen=True, slots=True)
class DeviceForm:
    """The portable graph of an artifact for CUDA, on one GPU."""

    device: Device
    shares: bool = False
    max_slots: int = 256
    prefill_chunk: int = 512

    @property
    def phrase(self) -> str:
        return f"CUDA graphs on {self.device}"

    def block(self, manifest: Manifest, max_context: int) -> Block:
        return Block(max_context, max_context * manifest.kv_bytes_per_token, manifest.kv_cache)

    def open(self, directory: Path, threads: int) -> ort.InferenceSession:
        del threads  # nothing is computed on the host
        try:
            return open_device_session(directory / GRAPH, self.device)
        except DeviceUnavailable as error:
            raise SettingsError(str(error)) from error

    def build(
        self, session: ort.InferenceSession, manifest: Manifest, settings: Settings, choices: Choices
    ) -> tuple[Runner, Scheduler]:
        chunk = settings.prefill_chunk or self.prefill_chunk
        slots, capacity, a = choices.num_slots, choices.max_context, manifest.architecture
        assert isinstance(session, DeviceSession)
        sizes = {"num_slots": slots, "capacity": capacity, "max_rows": chunk}
        runner = DeviceRunner(session, a, **sizes, stream=session.stream)
        return runner, make_scheduler(runner, SlotCache(slots, capacity, chunk), settings, choices, chunk)


def pick(wanted: str, manifest: Manifest, device: Device = HOST) -> Form:
    """The form named by `wanted`, "native" or "stock", or the fastest there is on the device ("auto").

    Raises SettingsError if there is no native form and it was asked for, or the artifact is for another device.
    """
    if manifest.target != device.kind:
        raise SettingsError(
            f"{manifest.name} was made for {manifest.target} and this server computes on {device}: serve it with "
            f"--device {manifest.target}, or make one with `python -m compress quantize --target {device.kind}`"
        )
    if device != HOST:
        if wanted == "native":
            raise SettingsError(f"--form native cannot be met on {device}: its operators are for CPUs; use --form auto")
        return DeviceForm(device)
    if wanted == "stock":
        return StockForm("stock graph: --form stock")
    try:
        if NATIVE_GRAPH not in manifest.files:
            raise NativeUnavailable(f"the artifact has no {NATIVE_GRAPH}")
        path = library()
        return NativeForm(f"native operators on {instruction_set(path)}", path)
    except NativeUnavailable as reason:
        if wanted == "native":
            raise SettingsError(f"--form native cannot be met: {reason}; use --form auto or stock") from reason
        return StockForm(f"stock graph: {reason}")


def make_scheduler(runner: Runner, cache: Cache, settings: Settings, choices: Choices, prefill_chunk: int) -> Scheduler:
    return Scheduler(
        cache,
        max_running=choices.num_slots,
        max_queue=settings.max_queue,
        prefill_chunk=prefill_chunk,
        any_chunking=runner.any_chunking,
        itl_limit=settings.itl_limit,
        speculate=settings.speculate,
        ahead=runner.guesses,
    )
