"""Arrays in a device's memory, which ONNX Runtime allocates; their rows are bound, read, written and copied."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serve.device_stream import Device, Stream, cudart

# Type of a graph's value -> the ONNX number of the type of its elements, and their bytes.
TYPES: Mapping[str, tuple[int, int]] = {
    "tensor(float)": (1, 4),
    "tensor(int8)": (3, 1),
    "tensor(int32)": (6, 4),
    "tensor(int64)": (7, 8),
    "tensor(float16)": (10, 2),
    "tensor(bfloat16)": (16, 2),
}


class DeviceArray:
    """An array [rows, ...] of a graph's value type. Copies of it are begun on the stream, and not waited for."""

    def __init__(self, shape: Sequence[int], kind: str, stream: Stream) -> None:
        """`kind` is one of `TYPES`. What it holds is not defined."""
        self.shape = tuple(shape)
        self.element_type, size = TYPES[kind]
        self.row_bytes = math.prod(self.shape[1:]) * size
        self.nbytes = self.shape[0] * self.row_bytes
        self._stream = stream
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(self.shape, self.element_type, *stream.device)
        self._address = int(self._value.data_ptr())

    def bind(self, binding: ort.IOBinding, name: str, first: int, rows: int, *, output: bool = False) -> None:
        """Bind `rows` rows from `first` on as the graph's value `name`."""
        bind = binding.bind_output if output else binding.bind_input
        bind(name, *self._stream.device, self.element_type, (rows, *self.shape[1:]), self._row(first, rows))

    def bind_as(self, binding: ort.IOBinding, name: str, first: int, kind: str, shape: Sequence[int]) -> None:
        """Bind as many of the rows from `first` on as hold it as an input of another type of as many bytes."""
        element_type, _ = TYPES[kind]
        binding.bind_input(name, *self._stream.device, element_type, shape, self._row(first, math.prod(shape)))

    def upload(self, values: NDArray[np.generic], first: int = 0) -> None:
        """Copy whole rows from an array of the stream's."""
        self._stream.upload(self._row(first, len(values)), values)

    def download(self, values: NDArray[np.generic], first: int = 0) -> None:
        """Copy whole rows to an array of the stream's."""
        self._stream.download(values, self._row(first, len(values)))

    def fetch(self, first: int, rows: int, dtype: type[np.generic]) -> NDArray[np.generic]:
        """A copy on the host of rows that nothing begun writes to."""
        values = np.empty((rows, *self.shape[1:]), dtype)
        self._stream.fetch(values, self._row(first, rows))
        return values

    def fetch_rows(self, rows: Sequence[int], dtype: type[np.generic]) -> NDArray[np.generic]:
        """The same of rows that lie together, or of none."""
        if not rows:
            return np.empty((0, *self.shape[1:]), dtype)
        first, last = min(rows), max(rows)
        return self.fetch(first, last - first + 1, dtype)[[row - first for row in rows]]

    def copy_row(self, source: int, target: DeviceArray, row: int) -> None:
        """Copy a row into that of an array of the same kind on the same device."""
        self._stream.move(target._row(row), self._row(source), self.row_bytes)

    def clear(self) -> None:
        """Write zeros."""
        self._stream.clear(self._address, self.nbytes)

    def _row(self, first: int, rows: int = 1) -> int:
        """Where it begins. Raises IndexError for rows beyond the end, where somebody else's memory is."""
        if first < 0 or rows < 1 or first + rows > self.shape[0]:
            raise IndexError(f"rows {first} to {first + rows} of an array of {self.shape[0]}")
        return self._address + first * self.row_bytes


def free_bytes(device: Device) -> int:
    """Free memory of a CUDA device, by the driver. Raises OSError if there is no CUDA."""
    runtime = cudart()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if runtime.cudaSetDevice(device.number) or runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        raise OSError(f"CUDA device {device.number} does not answer; `nvidia-smi` lists those there are")
    return free.value
