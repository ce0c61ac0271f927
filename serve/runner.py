"""The stock runner: executes plans with the portable graph, on any onnxruntime.

GroupQueryAttention on the CPU takes a ragged batch of single tokens, or one sequence of many. So a plan becomes one
decode run over all its single-token segments and a run per prompt chunk. The cache is a pool
`[rows, kv_heads, capacity, head_size]` per layer for keys and for values, written in place: a decode run of B rows
sees rows 0 to B - 1, a chunk sees its own row, both bound by pointer and without a copy.

A request therefore lies in one place: a block is a slot of `capacity` tokens, and a block table holds one. Rows that
decode must be the first ones. The runner keeps its own map from slot to row and exchanges rows when the decoding slots
are not contiguous, so nobody above needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from proto.manifest import GRAPH, Architecture
from serve.plan import Copy, Output, Plan, Segment

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


class StockRunner:
    """Owns the session and the cache's memory. One thread at a time."""

    any_chunking = False  # attention is computed in floating point, in an order that depends on the cuts

    def __init__(
        self, session: ort.InferenceSession, architecture: Architecture, *, num_slots: int, capacity: int, max_rows: int
    ) -> None:
        """`max_rows`: the most tokens of one chunk, and so the most rows of logits beside the decode rows."""
        self._session = session
        a = architecture
        kv_type = next(i.type for i in session.get_inputs() if i.name == "key_cache.0")
        kv_dtype = DTYPES[kv_type]
        shape = (num_slots, a.num_kv_heads, capacity, a.head_size)
        self._names = [f"{kind}_cache{{}}.{i}" for i in range(a.num_layers) for kind in ("key", "value")]
        self._caches = [np.zeros(shape, kv_dtype) for _ in self._names]  # pages become resident when first written
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)
        self._row_of = list(range(num_slots))
        self._slot_in = list(range(num_slots))
        self._length = [0] * num_slots  # valid tokens, by slot

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
        for copy in plan.copies:
            self._copy(copy)
        slots = [int(segment.blocks[0]) for segment in plan.segments]
        wanted = self._wanted_by_segment(plan)
        self._reserve(len(plan.wanted) + len(plan.hidden) + 1)
        decode = [i for i, s in enumerate(plan.segments) if s.count == 1 and len(wanted[i]) == 1]
        index: dict[int, int] = {}  # flat position -> row of the result buffers
        if decode:
            self._gather_rows([slots[i] for i in decode])
            for i in decode:
                index[plan.segments[i].start] = self._row_of[slots[i]]
            self._run_decode(plan, decode, slots)
        filled = len(decode)
        for i, segment in enumerate(plan.segments):
            if segment.count > 1 or len(wanted[i]) != 1:
                rows = [at - segment.start for at in wanted[i]]
                self._run_chunk(plan, segment, self._row_of[slots[i]], rows, filled)
                index.update((at, filled + n) for n, at in enumerate(wanted[i]))
                filled += len(wanted[i])
        for slot, segment in zip(slots, plan.segments, strict=True):
            self._length[slot] = segment.past + segment.count
        hidden = self._hidden[[index[at] for at in plan.hidden]]
        return Output(self._logits, hidden, [index[at] for at in plan.wanted])

    @staticmethod
    def _wanted_by_segment(plan: Plan) -> list[list[int]]:
        """Positions whose logits or hidden state is wanted: the graph computes both."""
        wanted: list[list[int]] = [[] for _ in plan.segments]
        owner = [i for i, s in enumerate(plan.segments) for _ in range(s.count)]
        for at in [*plan.wanted, *plan.hidden]:
            wanted[owner[at]].append(at)
        return wanted

    def _reserve(self, rows: int) -> None:
        """Grow the result buffers. Bindings hold pointers into them, so they are made anew."""
        if rows > len(self._logits):
            self._logits = np.zeros((rows, self._logits.shape[1]), np.float32)
            self._hidden = np.zeros((rows, self._hidden.shape[1]), np.float32)
            self._decode_bindings.clear()

    def _run_decode(self, plan: Plan, decode: Sequence[int], slots: Sequence[int]) -> None:
        """Run the single tokens of the segments numbered `decode`; each segment's slot is given."""
        batch = len(decode)
        for i in decode:
            row, segment = self._row_of[slots[i]], plan.segments[i]
            self._ids[row] = plan.tokens[segment.start]
            self._lengths[row] = segment.past
        self._total[...] = max(plan.segments[i].past for i in decode) + 1
        self._rows[:batch] = range(batch)
        binding = self._decode_bindings.get(batch)
        if binding is None:
            binding = self._decode_bindings[batch] = self._bind_caches(0, batch)
            self._bind_rows(binding, (batch, 1), 0, batch)
        self._session.run_with_iobinding(binding)

    def _run_chunk(self, plan: Plan, segment: Segment, row: int, wanted: list[int], filled: int) -> None:
        """Run a segment that lies in `row`; its `wanted` positions' results go to the buffers from `filled` on."""
        self._ids[: segment.count] = plan.tokens[segment.start : segment.start + segment.count]
        self._lengths[0] = segment.past + segment.count - 1
        self._total[...] = segment.past + segment.count
        rows = wanted or [segment.count - 1]  # at least one row: the graph's head does not take none
        self._rows[: len(rows)] = rows
        binding = self._chunk_bindings.get(row)
        if binding is None:
            binding = self._chunk_bindings[row] = self._bind_caches(row, 1)
        self._bind_rows(binding, (1, segment.count), filled, len(rows))
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

    def _gather_rows(self, slots: list[int]) -> None:
        """Move the decoding slots into the first rows."""
        batch = len(slots)
        holes = [row for row in range(batch) if self._slot_in[row] not in set(slots)]
        for slot in slots:
            if self._row_of[slot] >= batch:
                self._exchange(self._row_of[slot], holes.pop())

    def _exchange(self, a: int, b: int) -> None:
        slot_a, slot_b = self._slot_in[a], self._slot_in[b]
        used_a, used_b = self._length[slot_a], self._length[slot_b]
        for cache in self._caches:
            kept = cache[a, :, :used_a].copy()
            cache[a, :, :used_b] = cache[b, :, :used_b]
            cache[b, :, :used_a] = kept
        self._slot_in[a], self._slot_in[b] = slot_b, slot_a
        self._row_of[slot_a], self._row_of[slot_b] = b, a

    def _copy(self, copy: Copy) -> None:
        source, target = self._row_of[copy.source], self._row_of[copy.target]
        for cache in self._caches:
            cache[target, :, : copy.length] = cache[source, :, : copy.length]
        self._length[copy.target] = copy.length


def _bind(bind: object, name: str, array: Array, shape: Sequence[int]) -> None:
    bind(name, "cpu", 0, array.dtype, shape, array.ctypes.data)  # type: ignore[operator]
