"""The runner of graphs that choose on the device: caches and results stay there, and small arrays cross.

1 tokens, lengths and what is needed to choose go to the device in one copy; 2 it decodes all rows in one run, and
prompt chunks in one each; 3 of every row come back the largest logits, which tokens they are, the sum of all, and the
token that the device guesses: some hundreds of bytes. `launch` begins all of that and waits for nothing; a row of the
next plan may take the guess for its token, which lies on the device already.

Decode runs have one of a ladder of sizes, each with arrays bound once: on CUDA such a run is captured as a CUDA graph
by the thread that will run plans, and replayed. Rows of the size that decode nothing write one position behind their
last token, which nobody reads. A captured run knows no lengths but those on the device, so the host always says
`capacity`.

A plan's results are read while the next one runs, so there are two sides: two buffers for results, used in turns, and
of every captured graph two. A run reads the guesses of the other side and writes its own: it may be repeated, as it is
when it is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count, product
from typing import Any, cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from proto.manifest import Architecture
from serve.device_memory import DeviceArray
from serve.device_stream import ON_HOST, Stream
from serve.plan import Copy, Floats, Output, Plan, Segment
from serve.slot_runner import SlotRunner

NO_CAPTURE = "-1"
GRAPHS = count()  # their numbers: a session may see several runners
RESULTS: dict[str, type[np.generic]] = {
    "logits": np.float32,
    "hidden": np.float32,
    "candidates": np.int32,
    "candidate_logits": np.float32,
    "total": np.float32,
}
DOWNLOADED = ("candidates", "candidate_logits", "total")
# What a decode run is told of each row, in words of 4 bytes: its token unless it is guessed, and then by the graph's
# names where its token lies, its length, and what is needed to choose.
FIELDS: dict[str, type[np.generic]] = {
    "known": np.int32,
    "token_rows": np.int32,
    "seqlens_k": np.int32,
    "temperature": np.float32,
    "share": np.float32,
    "top_p": np.float32,
}
WAYS = ("temperature", "share", "top_p")
NO_WAY = (1.0, 0.0, 1.0)  # the largest, and the sum at temperature 1
KINDS: dict[type[np.generic], str] = {np.int32: "tensor(int32)", np.float32: "tensor(float)"}


def ladder(num_slots: int) -> list[int]:
    """Sizes of decode runs: powers of two up to the first that holds all slots, which is cut to them."""
    sizes = [2**power for power in range(num_slots.bit_length())]
    return [*(size for size in sizes if size < num_slots), num_slots]


class DeviceRunner(SlotRunner):
    """Owns the memory on the session's device."""

    guesses = True

    def __init__(
        self,
        session: ort.InferenceSession,
        architecture: Architecture,
        *,
        num_slots: int,
        capacity: int,
        max_rows: int,
        stream: Stream = ON_HOST,
    ) -> None:
        """`max_rows`: the most tokens of one chunk; `stream`: on which the session runs."""
        super().__init__(num_slots)
        self._session = session
        self._stream = stream
        self._capacity = capacity
        self._ladder = ladder(num_slots)
        a = architecture
        kinds = {value.name: value.type for value in session.get_inputs()}
        shape = (num_slots, a.num_kv_heads, capacity, a.head_size)
        self._names = [f"{kind}_cache{{}}.{i}" for i in range(a.num_layers) for kind in ("key", "value")]
        self._caches = [DeviceArray(shape, kinds[name.format("")], stream) for name in self._names]
        for cache in self._caches:
            cache.clear()  # whatever lay there, NaN too, would pass through the masks
        self._spare = DeviceArray((1, *shape[1:]), kinds["key_cache.0"], stream)
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)

        # Decode rows, as many that `_reserve` counts twice, and of chunks: a step may begin one and end another.
        self._rows = 2 * num_slots + 2 * max_rows + 1
        sizes = {value.name: value.shape[1:] for value in session.get_outputs()}
        # The guesses of either side, and behind them the fields of a decode run.
        self._fields = 2 * self._rows
        self._words = DeviceArray((self._fields + len(FIELDS) * num_slots,), "tensor(int32)", stream)
        self._words.clear()
        self._sides = [Side(first, self._rows, num_slots, sizes, stream) for first in (0, self._rows)]
        self._side = self._sides[0]
        self._row_of_position: dict[int, int] = {}  # of the latest plan: where its results lie
        self._ways: dict[int, tuple[float, float, float]] = {}
        self._all_rows = DeviceArray((num_slots,), "tensor(int64)", stream)
        self._all_rows.upload(np.arange(num_slots))
        self._full = np.array(capacity, np.int32)
        self._uncaptured = _run_options(NO_CAPTURE)
        for side, size in product(self._sides, self._ladder):
            side.decodes[size] = self._bind_decode(side, size), _run_options(str(next(GRAPHS)))
        self._session.run_with_iobinding(self._bind_decode(self._side, num_slots), self._uncaptured)  # fails early
        stream.mark()()
        self._prepared = False

    def prepare(self) -> None:
        """Capture every size of decode run, if the session captures: ONNX Runtime keeps them for this thread alone."""
        if not self._prepared:
            for side in self._sides:
                for decode in side.decodes.values():
                    self._session.run_with_iobinding(*decode)
            self._stream.mark()()
            self._prepared = True

    def _bind_decode(self, side: Side, size: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        num_slots = len(self._row_of)
        self._bind_caches(binding, 0, size)
        self._words.bind(binding, "tokens", 0, self._fields + num_slots)
        for number, (name, dtype) in enumerate(FIELDS.items()):
            if name != "known":
                shape = (size, 1) if name == "token_rows" else (size,)
                self._words.bind_as(binding, name, self._fields + number * num_slots, KINDS[dtype], shape)
        self._all_rows.bind(binding, "logits_rows", 0, size)
        self._bind_results(binding, side, 0, size)
        _bind_host(binding, "total_sequence_length", self._full)
        return binding

    def _bind_caches(self, binding: ort.IOBinding, first: int, rows: int) -> None:
        for name, cache in zip(self._names, self._caches, strict=True):
            cache.bind(binding, name.format(""), first, rows)
            cache.bind(binding, name.format("_out"), first, rows, output=True)

    def _bind_results(self, binding: ort.IOBinding, side: Side, first: int, rows: int) -> None:
        for name, array in side.results.items():
            array.bind(binding, name, first, rows, output=True)
        self._words.bind(binding, "guesses", side.guesses + first, rows, output=True)

    @property
    def _other(self) -> Side:
        return self._sides[self._side is self._sides[0]]

    def run(self, plan: Plan) -> Output:
        return self.launch(plan)()

    def launch(self, plan: Plan) -> Callable[[], Output]:
        """Begin `plan`. Its results are valid until the next launch but one."""
        self.prepare()
        self._side = side = self._other
        self._ways = _ways(plan)
        index = self._row_of_position = self._begin(plan)
        wanted = [index[at] for at in plan.wanted]
        rows = max(wanted, default=0) + 1
        for name in DOWNLOADED:
            side.results[name].download(side.host[name][:rows])
        self._words.download(side.host["guesses"][:rows], side.guesses)
        wait = self._stream.mark()

        def results() -> Output:
            wait()
            hidden = side.results["hidden"].fetch_rows([index[at] for at in plan.hidden], np.float32)
            return Output(DeviceRows(side.results["logits"]), cast(Floats, hidden), wanted, **side.host)

        return results

    def _batch(self, num_rows: int) -> int:
        return next(size for size in self._ladder if size >= num_rows)

    def _reserve(self, rows: int) -> None:
        if (needed := len(self._row_of) + rows) > self._rows:
            raise ValueError(f"a step wants {needed} rows of results and there is room for {self._rows}; ask for fewer")

    def _run_decode(self, plan: Plan, segments: Sequence[tuple[int, Segment]], batch: int) -> None:
        fields = self._side.fields
        fields["token_rows"][:] = range(self._fields, self._fields + len(self._row_of))
        for row in range(batch):
            fields["seqlens_k"][row] = min(self._length[self._slot_in[row]], self._capacity - 1)
        for row, segment in segments:
            if segment.follows is None:
                fields["known"][row] = plan.tokens[segment.start]
            else:
                fields["token_rows"][row] = self._other.guesses + self._row_of_position[segment.follows]
            fields["seqlens_k"][row] = segment.past
            for name, value in zip(WAYS, self._ways.get(segment.start, NO_WAY), strict=True):
                fields[name][row] = value
        self._words.upload(self._side.words, self._fields)
        self._session.run_with_iobinding(*self._side.decodes[batch])

    def _run_chunk(self, plan: Plan, segment: Segment, row: int, wanted: list[int], filled: int) -> None:
        chosen = [self._ways.get(segment.start + at, NO_WAY) for at in wanted]
        end = segment.past + segment.count
        feeds: dict[str, NDArray[Any]] = {
            "tokens": np.array(plan.tokens[segment.start : segment.start + segment.count], np.int32),
            "token_rows": np.arange(segment.count, dtype=np.int32)[None],
            "seqlens_k": np.array([end - 1], np.int32),
            "total_sequence_length": np.array(end, np.int32),
            "logits_rows": np.array(wanted, np.int64),
            **{
                name: np.array(values, np.float32) for name, values in zip(WAYS, zip(*chosen, strict=True), strict=True)
            },
        }
        binding = self._session.io_binding()
        self._bind_caches(binding, row, 1)
        self._bind_results(binding, self._side, filled, len(wanted))
        for name, array in feeds.items():
            _bind_host(binding, name, array)
        self._session.run_with_iobinding(binding, self._uncaptured)

    def _swap_rows(self, a: int, b: int, used_a: int, used_b: int) -> None:
        for cache in self._caches:
            cache.copy_row(a, self._spare, 0)
            cache.copy_row(b, cache, a)
            self._spare.copy_row(0, cache, b)

    def _copy_row(self, source: int, target: int, copy: Copy) -> None:
        if source != target:
            for cache in self._caches:
                cache.copy_row(source, cache, target)


class Side:
    """Buffers of one plan's results on the device, of what is told and read of them on the host, and decode runs."""

    def __init__(
        self, guesses: int, rows: int, num_slots: int, sizes: Mapping[str, Sequence[int]], stream: Stream
    ) -> None:
        """`guesses`: where among the words its guesses begin."""
        self.guesses = guesses
        self.results = {
            name: DeviceArray((rows, *sizes[name]), KINDS[dtype], stream) for name, dtype in RESULTS.items()
        }
        self.host = {name: stream.zeros((rows, *sizes[name]), RESULTS[name]) for name in DOWNLOADED}
        self.host["guesses"] = stream.zeros((rows,), np.int32)
        self.words = stream.zeros((len(FIELDS) * num_slots,), np.int32)
        parts = np.split(self.words, len(FIELDS))
        self.fields = {name: part.view(dtype) for part, (name, dtype) in zip(parts, FIELDS.items(), strict=True)}
        for name, value in zip(WAYS, NO_WAY, strict=True):
            self.fields[name][:] = value
        self.decodes: dict[int, tuple[ort.IOBinding, ort.RunOptions]] = {}


class DeviceRows:
    """Logits [rows, vocabulary] on the device; each row is fetched when it is asked for, and again when it is again."""

    def __init__(self, array: DeviceArray) -> None:
        self._array = array

    def __getitem__(self, index: Any, /) -> Floats:
        """By a row, by some of them, or by rows [n, 1] and columns [n, k]."""
        if isinstance(index, tuple):
            rows, columns = index
            found: Floats = np.take_along_axis(self[np.ravel(rows)], columns, axis=1)
            return found
        fetched = [cast(Floats, self._array.fetch(int(row), 1, np.float32)) for row in np.ravel(index)]
        return fetched[0][0] if np.ndim(index) == 0 else np.concatenate(fetched)


def _ways(plan: Plan) -> dict[int, tuple[float, float, float]]:
    """Of each wanted position the temperature, the share and top_p."""
    shares, top_ps = plan.shares or [0.0] * len(plan.wanted), plan.top_ps or [1.0] * len(plan.wanted)
    greedy, *_ = NO_WAY
    return {
        at: (temperature or greedy, share, top_p)
        for at, temperature, share, top_p in zip(plan.wanted, plan.temperatures, shares, top_ps, strict=True)
    }


def _run_options(graph: str) -> ort.RunOptions:
    """For the CUDA graph of this number, without a wait for its end."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _bind_host(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
