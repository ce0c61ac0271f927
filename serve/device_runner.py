"""The runner of graphs that choose on the device: caches and results stay there, and small arrays cross.

1 tokens, lengths and temperatures go to the device; 2 it decodes all rows in one run, and prompt chunks in one each;
3 of every row come back the largest logits, which tokens they are, and the sum of all: some hundreds of bytes.

Decode runs have one of a ladder of sizes, each with arrays bound once: on CUDA such a run is captured as a CUDA graph
when the runner is made, and replayed. Rows of the size that decode nothing write one position behind their last token,
which nobody reads. A captured run knows no lengths but those on the device, so the host always says `capacity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from proto.manifest import Architecture
from serve.device_memory import HOST, Device, DeviceArray
from serve.plan import Copy, Floats, Output, Plan, Segment
from serve.slot_runner import SlotRunner

NO_CAPTURE = "-1"
KINDS = {"logits": np.float32, "hidden": np.float32, "candidates": np.int32, "candidate_logits": np.float32}


def ladder(num_slots: int) -> list[int]:
    """Sizes of decode runs: powers of two up to the first that holds all slots, which is cut to them."""
    sizes = [2**power for power in range(num_slots.bit_length())]
    return [*(size for size in sizes if size < num_slots), num_slots]


class DeviceRunner(SlotRunner):
    """Owns the session and the memory on its device."""

    def __init__(
        self,
        session: ort.InferenceSession,
        architecture: Architecture,
        *,
        num_slots: int,
        capacity: int,
        max_rows: int,
        device: Device = HOST,
    ) -> None:
        """`max_rows`: the most tokens of one chunk. Captures every size of decode run, if the session captures."""
        super().__init__(num_slots)
        self._session = session
        self._device = device
        self._capacity = capacity
        self._ladder = ladder(num_slots)
        a = architecture
        kinds = {value.name: value.type for value in session.get_inputs()}
        shape = (num_slots, a.num_kv_heads, capacity, a.head_size)
        self._names = [f"{kind}_cache{{}}.{i}" for i in range(a.num_layers) for kind in ("key", "value")]
        self._caches = [DeviceArray(shape, kinds[name.format("")], device) for name in self._names]
        for cache in self._caches:
            cache.clear()  # whatever lay there, NaN too, would pass through the masks
        self._spare = DeviceArray((1, *shape[1:]), kinds["key_cache.0"], device)
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)

        # A step may begin one chunk and end another.
        rows = num_slots + 2 * max_rows + 1
        sizes = {value.name: value.shape[1:] for value in session.get_outputs()}
        self._results = {
            name: DeviceArray((rows, *sizes[name]), "tensor(int32)" if dtype is np.int32 else "tensor(float)", device)
            for name, dtype in KINDS.items()
        }
        self._results["total"] = DeviceArray((rows,), "tensor(float)", device)
        self._rows = rows

        self._inputs = {name: DeviceArray((num_slots, *width), kinds[name], device) for name, width in WIDTHS.items()}
        self._inputs["logits_rows"].write(np.arange(num_slots))
        self._host: dict[str, NDArray[Any]] = {
            "input_ids": np.zeros((num_slots, 1), np.int64),
            "seqlens_k": np.zeros(num_slots, np.int32),
            "temperature": np.ones(num_slots, np.float32),
        }
        self._full = np.array(capacity, np.int32)
        self._decodes = {size: self._bind_decode(size) for size in self._ladder}
        self._uncaptured = _run_options(NO_CAPTURE)
        for size in self._ladder:
            self._decode(size)

    def _bind_decode(self, size: int) -> tuple[ort.IOBinding, ort.RunOptions]:
        binding = self._session.io_binding()
        self._bind_caches(binding, 0, size)
        for name, array in self._inputs.items():
            array.bind(binding, name, 0, size)
        self._bind_results(binding, 0, size)
        _bind_host(binding, "total_sequence_length", self._full)
        return binding, _run_options(str(size))

    def _bind_caches(self, binding: ort.IOBinding, first: int, rows: int) -> None:
        for name, cache in zip(self._names, self._caches, strict=True):
            cache.bind(binding, name.format(""), first, rows)
            cache.bind(binding, name.format("_out"), first, rows, output=True)

    def _bind_results(self, binding: ort.IOBinding, first: int, rows: int) -> None:
        for name, array in self._results.items():
            array.bind(binding, name, first, rows, output=True)

    def _decode(self, size: int) -> None:
        for name, array in self._host.items():
            self._inputs[name].write(array[:size])
        binding, options = self._decodes[size]
        self._session.run_with_iobinding(binding, options)

    def _batch(self, num_rows: int) -> int:
        return next(size for size in self._ladder if size >= num_rows)

    def _reserve(self, rows: int) -> None:
        if (needed := len(self._row_of) + rows) > self._rows:
            raise ValueError(f"a step wants {needed} rows of results and there is room for {self._rows}; ask for fewer")

    def _run_decode(self, plan: Plan, segments: Sequence[tuple[int, Segment]], batch: int) -> None:
        host, temperatures = self._host, dict(zip(plan.wanted, plan.temperatures, strict=True))
        for row in range(batch):
            host["seqlens_k"][row] = min(self._length[self._slot_in[row]], self._capacity - 1)
        host["temperature"][:batch] = 1
        for row, segment in segments:
            host["input_ids"][row] = plan.tokens[segment.start]
            host["seqlens_k"][row] = segment.past
            host["temperature"][row] = temperatures.get(segment.start) or 1  # greedy rows need no sum
        self._decode(batch)

    def _run_chunk(self, plan: Plan, segment: Segment, row: int, wanted: list[int], filled: int) -> None:
        temperatures = dict(zip(plan.wanted, plan.temperatures, strict=True))
        end = segment.past + segment.count
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.array([plan.tokens[segment.start : segment.start + segment.count]], np.int64),
            "seqlens_k": np.array([end - 1], np.int32),
            "total_sequence_length": np.array(end, np.int32),
            "logits_rows": np.array(wanted, np.int64),
            "temperature": np.array([temperatures.get(segment.start + at) or 1 for at in wanted], np.float32),
        }
        binding = self._session.io_binding()
        self._bind_caches(binding, row, 1)
        self._bind_results(binding, filled, len(wanted))
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

    def _output(self, wanted: list[int], hidden: list[int], filled: int) -> Output:
        results = self._results
        states = [results["hidden"].read(row, 1, np.float32) for row in hidden]
        width = results["hidden"].shape[1]
        count = max(wanted, default=0) + 1
        return Output(
            DeviceRows(results["logits"]),
            cast(Floats, np.concatenate([*states, np.zeros((0, width), np.float32)])),
            wanted,
            cast(NDArray[np.int32], results["candidates"].read(0, count, np.int32)),
            cast(Floats, results["total"].read(0, count, np.float32)),
            cast(Floats, results["candidate_logits"].read(0, count, np.float32)),
        )


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
        fetched = [cast(Floats, self._array.read(int(row), 1, np.float32)) for row in np.ravel(index)]
        return fetched[0][0] if np.ndim(index) == 0 else np.concatenate(fetched)


WIDTHS: dict[str, tuple[int, ...]] = {"input_ids": (1,), "seqlens_k": (), "logits_rows": (), "temperature": ()}


def _run_options(graph: str) -> ort.RunOptions:
    """For the CUDA graph of this number."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


def _bind_host(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
