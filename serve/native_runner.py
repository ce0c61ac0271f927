"""The native runner: executes a whole plan in one run of the graph on our operators (docs/native.md).

The cache is one array, read and written in place through block tables. Everything that a run takes or gives lies in
arrays that are kept from run to run; what is bound to a run depends on four counts only, so bindings are kept too.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from proto.manifest import Architecture
from serve.block_cache import BLOCK, blocks_for
from serve.plan import Output, Plan, Runner

ALIGNMENT = 64  # bytes, of the cache and so of every block
MOST_BINDINGS = 256
NUM_CANDIDATES = 64  # the largest logits that `Select` names

Array = NDArray[np.generic]


def block_bytes(head_size: int) -> int:
    """Of the keys and values of one layer and KV head at the positions of a block, with their scales."""
    key, value = (-(-head_size // n) * n for n in (64, 16))
    return BLOCK * (key + value) + 2 * BLOCK * 4


def block_shape(architecture: Architecture) -> tuple[int, int, int]:
    """[layers, kv_heads, bytes] of one block."""
    return architecture.num_layers, architecture.num_kv_heads, block_bytes(architecture.head_size)


class NativeRunner(Runner):
    """Owns the session and the cache's memory. One thread at a time."""

    any_chunking = True

    def __init__(
        self, session: ort.InferenceSession, architecture: Architecture, *, num_blocks: int, capacity: int
    ) -> None:
        """`capacity`: the most tokens of one request, and so the width of block tables."""
        self._session = session
        shape = (num_blocks, *block_shape(architecture))
        self._cache = _zeros(shape)
        self.kv_bytes = self._cache.nbytes
        self._vocab_size = architecture.vocab_size
        self._hidden_size = architecture.hidden_size
        self._width = blocks_for(capacity)
        self._bindings: dict[tuple[int, int, int, int], ort.IOBinding] = {}
        self._sizes = [0, 0, 0, 0]  # tokens, segments, rows and hidden rows that the arrays have room for
        self._reserve((64, 8, 8, 1))

    def run(self, plan: Plan) -> Output:
        """Execute `plan`; its results are valid until the next run."""
        sizes = len(plan.tokens), len(plan.segments), len(plan.wanted), len(plan.hidden)
        tokens, segments, rows, hidden = sizes
        if not tokens:
            return Output(self._logits, self._hidden[:0], range(0), self._found, self._total)
        binding = self._bindings.get(sizes) or self._bind(sizes)
        self._ids[:tokens] = plan.tokens
        self._segments[:segments] = [(s.past, s.start, s.count) for s in plan.segments]
        for table, segment in zip(self._blocks, plan.segments, strict=False):
            table[: len(segment.blocks)] = segment.blocks
        self._rows[:rows] = plan.wanted
        self._temperatures[:rows] = plan.temperatures
        if hidden:
            self._hidden_rows[:hidden] = plan.hidden
        self._session.run_with_iobinding(binding)
        return Output(self._logits, self._hidden[:hidden], range(rows), self._found, self._total)

    def _reserve(self, sizes: tuple[int, int, int, int]) -> None:
        """Make the arrays large enough. Bindings hold pointers into them, so they are made anew."""
        if all(size <= room for size, room in zip(sizes, self._sizes, strict=True)):
            return
        self._bindings.clear()
        pairs = zip(sizes, self._sizes, strict=True)
        self._sizes = [room if size <= room else 2 * size for size, room in pairs]
        tokens, segments, rows, hidden = self._sizes
        self._ids = np.zeros(tokens, np.int64)
        self._segments = np.zeros((segments, 3), np.int32)
        self._blocks = np.zeros((segments, self._width), np.int32)
        self._rows = np.zeros(rows, np.int64)
        self._temperatures = np.zeros(rows, np.float32)
        self._hidden_rows = np.zeros(hidden, np.int64)
        self._logits = np.zeros((rows, self._vocab_size), np.float32)
        self._candidates = np.zeros((rows, NUM_CANDIDATES), np.int32)
        self._found = self._candidates[:, : self._vocab_size]
        self._total = np.zeros(rows, np.float32)
        self._hidden = np.zeros((hidden, self._hidden_size), np.float32)

    def _bind(self, sizes: tuple[int, int, int, int]) -> ort.IOBinding:
        self._reserve(sizes)
        if len(self._bindings) >= MOST_BINDINGS:
            self._bindings.clear()
        tokens, segments, rows, hidden = sizes
        binding = self._session.io_binding()
        inputs: list[tuple[str, Array, int]] = [
            ("input_ids", self._ids, tokens),
            ("segments", self._segments, segments),
            ("blocks", self._blocks, segments),
            ("logits_rows", self._rows, rows),
            ("hidden_rows", self._hidden_rows, hidden),
            ("temperature", self._temperatures, rows),
            ("cache", self._cache, len(self._cache)),
        ]
        outputs: list[tuple[str, Array, int]] = [
            ("logits", self._logits, rows),
            ("candidates", self._candidates, rows),
            ("total", self._total, rows),
            ("hidden", self._hidden, hidden),
        ]
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array, count in arrays:
                bind(name, "cpu", 0, array.dtype, (count, *array.shape[1:]), array.ctypes.data)
        self._bindings[sizes] = binding
        return binding


def _zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Aligned bytes. The pages become resident when they are first written."""
    size = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].reshape(shape)
