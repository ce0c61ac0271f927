"""A device's order of work: what is begun on a stream is done in that order, while the host goes on.

ONNX Runtime runs its sessions on the stream that it is given; copies beside its runs go through CUDA's own runtime,
from and to pinned memory, which the device reads and writes by itself. On the host everything is done at once.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

CUDART = "libcudart.so.13"  # of the CUDA that requirements/gpu.txt is built for
NON_BLOCKING = 1  # cudaStreamNonBlocking: nobody else's work is waited for
NO_TIMING = 2  # cudaEventDisableTiming
UPLOAD, DOWNLOAD, MOVE = 1, 2, 3  # cudaMemcpyKind


class Device(NamedTuple):
    """As ONNX Runtime calls it: "cpu" or "cuda", and its number."""

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


HOST = Device("cpu")


class Stream:
    """The host's."""

    device = HOST
    handle = 0  # as ONNX Runtime takes it

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Memory of the host that the device can reach."""
        return np.zeros(shape, dtype)

    def upload(self, target: int, values: NDArray[Any]) -> None:
        """Begin to copy an array to an address on the device."""
        ctypes.memmove(target, values.ctypes.data, values.nbytes)

    def download(self, values: NDArray[Any], source: int) -> None:
        """Begin to fill an array from an address on the device."""
        ctypes.memmove(values.ctypes.data, source, values.nbytes)

    def move(self, target: int, source: int, size: int) -> None:
        """Begin to copy bytes within the device's memory."""
        ctypes.memmove(target, source, size)

    def clear(self, target: int, size: int) -> None:
        """Begin to write zeros."""
        ctypes.memset(target, 0, size)

    def fetch(self, values: NDArray[Any], source: int) -> None:
        """Fill an array from an address that nothing begun writes to, past all that is begun, and wait for it."""
        ctypes.memmove(values.ctypes.data, source, values.nbytes)

    def mark(self) -> Callable[[], None]:
        """Mark what has been begun; calling what comes back waits for that, and for no later work."""
        return _nothing


ON_HOST = Stream()


class CudaStream(Stream):
    """A CUDA device's; to be used by one thread at a time. Raises OSError where CUDA's runtime does not do as asked."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._cudart = cudart()
        self._call("cudaSetDevice", device.number)
        self._order, self._aside = ctypes.c_void_p(), ctypes.c_void_p()
        for stream in (self._order, self._aside):
            self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), NON_BLOCKING)
            _finally(self, self._cudart.cudaStreamDestroy, stream)
        self.handle = self._order.value or 0

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        size = max(math.prod(shape), 1) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        self._call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), 0)
        memory = (ctypes.c_byte * size).from_address(address.value or 0)
        _finally(memory, self._cudart.cudaFreeHost, address)
        values: NDArray[Any] = np.ndarray(shape, dtype, memoryview(memory))
        values[...] = 0
        return values

    def upload(self, target: int, values: NDArray[Any]) -> None:
        self._copy(target, values.ctypes.data, values.nbytes, UPLOAD, self._order)

    def download(self, values: NDArray[Any], source: int) -> None:
        self._copy(values.ctypes.data, source, values.nbytes, DOWNLOAD, self._order)

    def move(self, target: int, source: int, size: int) -> None:
        self._copy(target, source, size, MOVE, self._order)

    def clear(self, target: int, size: int) -> None:
        self._call("cudaSetDevice", self.device.number)
        self._call("cudaMemsetAsync", ctypes.c_void_p(target), 0, ctypes.c_size_t(size), self._order)

    def fetch(self, values: NDArray[Any], source: int) -> None:
        self._copy(values.ctypes.data, source, values.nbytes, DOWNLOAD, self._aside)
        self._call("cudaStreamSynchronize", self._aside)

    def mark(self) -> Callable[[], None]:
        event = ctypes.c_void_p()
        self._call("cudaSetDevice", self.device.number)
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), NO_TIMING)
        self._call("cudaEventRecord", event, self._order)

        def wait() -> None:
            self._call("cudaEventSynchronize", event)
            self._call("cudaEventDestroy", event)

        return wait

    def _copy(self, target: int, source: int, size: int, kind: int, stream: ctypes.c_void_p) -> None:
        self._call("cudaSetDevice", self.device.number)  # of this thread
        to, from_, count = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
        self._call("cudaMemcpyAsync", to, from_, count, kind, stream)

    def _call(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._cudart, name)(*arguments):
            why = self._cudart.cudaGetErrorString(error).decode()
            raise OSError(f"{name} on {self.device}: {why}")


def cudart() -> ctypes.CDLL:
    """CUDA's runtime. Raises OSError if it is not there."""
    ort.preload_dlls()  # those that pip installed
    library = ctypes.CDLL(CUDART)
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _finally(owner: Any, release: Callable[[Any], Any], handle: ctypes.c_void_p) -> None:
    """Release what an object owned once it is gone; not at exit, when sessions may still use it."""
    weakref.finalize(owner, release, handle).atexit = False


def _nothing() -> None:
    pass
