"""The stock runner: executes plans with the portable graph, on any onnxruntime, in this process's own memory.

Every row of the cache is bound by pointer and without a copy; results are arrays that runs write into.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from proto.manifest import GRAPH, Architecture
from serve.plan import Copy, Output, Plan, Segment
from serve.slot_runner import SlotRunner

Array = NDArray[np.generic]
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}  # of caches


def open_session(
    directory: Path, threads: int, graph: str = GRAPH, library: Path | None = None, profile: Path | None = None
) -> ort.InferenceSession:
    """One of the artifact's graphs with `threads` compute threads; `library` holds the operators of its own.

    With `profile`, each node's time goes to a file of this prefix until the session's `end_profiling`.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # shapes change from run to run
    if library is not None:
        options.register_custom_ops_library(str(library))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(str(directory / graph), options, providers=["CPUExecutionProvider"])


class StockRunner(SlotRunner):
    """Owns the session and the cache's memory."""

    def __init__(
        self, session: ort.InferenceSession, architecture: Architecture, *, num_slots: int, capacity: int, max_rows: int
    ) -> None:
        """`max_rows`: the most tokens of one chunk, and so the most rows of logits beside the decode rows."""
        super().__init__(num_slots)
        self._session = session
        a = architecture
        kv_type = next(i.type for i in session.get_inputs() if i.name == "key_cache.0")
        shape = (num_slots, a.num_kv_heads, capacity, a.head_size)
        self._names = [f"{kind}_cache{{}}.{i}" for i in range(a.num_layers) for kind in ("key", "value")]
        self._caches = [np.zeros(shape, DTYPES[kv_type]) for _ in self._names]  # pages become resident when written
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)

        self._ids = np.zeros(max(num_slots, max_rows), np.int64)
        self._lengths = np.zeros(num_slots, np.int32)  # seqlens_k
        self._total = np.zeros((), np.int32)
        self._rows = np.zeros(max(num_slots, max_rows), np.int64)
        self._logits = np.zeros((num_slots, a.vocab_size), np.float32)
        self._hidden = np.zeros((num_slots, a.hidden_size), np.float32)
        self._decode_bindings: dict[int, ort.IOBinding] = {}
        self._chunk_bindings: dict[int, ort.IOBinding] = {}

    def run(self, plan: Plan) -> Output:
        """Execute `plan`; its results are valid until the next run."""
        index = self._begin(plan)
        return Output(self._logits, self._hidden[[index[at] for at in plan.hidden]], [index[at] for at in plan.wanted])

    def _batch(self, num_rows: int) -> int:
        return num_rows

    def _reserve(self, rows: int) -> None:
        """Grow the result buffers. Bindings hold pointers into them, so they are made anew."""
        if rows > len(self._logits):
            self._logits = np.zeros((rows, self._logits.shape[1]), np.float32)
            self._hidden = np.zeros((rows, self._hidden.shape[1]), np.float32)
            self._decode_bindings.clear()

    def _run_decode(self, plan: Plan, segments: Sequence[tuple[int, Segment]], batch: int) -> None:
        for row, segment in segments:
            self._ids[row] = plan.tokens[segment.start]
            self._lengths[row] = segment.past
        self._total[...] = max(segment.past for _, segment in segments) + 1
        self._rows[:batch] = range(batch)
        binding = self._decode_bindings.get(batch)
        if binding is None:
            binding = self._decode_bindings[batch] = self._bind_caches(0, batch)
            self._bind_rows(binding, (batch, 1), 0, batch)
        self._session.run_with_iobinding(binding)

    def _run_chunk(self, plan: Plan, segment: Segment, row: int, wanted: list[int], filled: int) -> None:
        self._ids[: segment.count] = plan.tokens[segment.start : segment.start + segment.count]
        self._lengths[0] = segment.past + segment.count - 1
        self._total[...] = segment.past + segment.count
        self._rows[: len(wanted)] = wanted
        binding = self._chunk_bindings.get(row)
        if binding is None:
            binding = self._chunk_bindings[row] = self._bind_caches(row, 1)
        self._bind_rows(binding, (1, segment.count), filled, len(wanted))
        self._session.run_with_iobinding(binding)

    def _bind_caches(self, first: int, batch: int) -> ort.IOBinding:
        """Caches of rows `first` to `first + batch`, read and written in place."""
        binding = self._session.io_binding()
        for name, cache in zip(self._names, self._caches, strict=True):
            view = cache[first : first + batch]
            _bind(binding.bind_input, name.format(""), view, view.shape)
            _bind(binding.bind_output, name.format("_out"), view, view.shape)
        return binding

    def _bind_rows(self, binding: ort.IOBinding, shape: tuple[int, int], filled: int, rows: int) -> None:
        """Everything but the caches: `shape` is [batch, sequence]; results go to buffer rows from `filled` on."""
        _bind(binding.bind_input, "input_ids", self._ids, shape)
        _bind(binding.bind_input, "seqlens_k", self._lengths, shape[:1])
        _bind(binding.bind_input, "total_sequence_length", self._total, ())
        _bind(binding.bind_input, "logits_rows", self._rows, (rows,))
        for name, buffer in (("logits", self._logits), ("hidden", self._hidden)):
            _bind(binding.bind_output, name, buffer[filled:], (rows, buffer.shape[1]))

    def _swap_rows(self, a: int, b: int, used_a: int, used_b: int) -> None:
        for cache in self._caches:
            kept = cache[a, :, :used_a].copy()
            cache[a, :, :used_b] = cache[b, :, :used_b]
            cache[b, :, :used_a] = kept

    def _copy_row(self, source: int, target: int, copy: Copy) -> None:
        for cache in self._caches:
            cache[target, :, : copy.length] = cache[source, :, : copy.length]


def _bind(bind: object, name: str, array: Array, shape: Sequence[int]) -> None:
    bind(name, "cpu", 0, array.dtype, shape, array.ctypes.data)  # type: ignore[operator]
