"""Arrays in the memory of a device, which ONNX Runtime allocates, and their rows, read, written and copied one by one.

Everything goes through ONNX Runtime's own values, so that the same code runs in the host's memory: there are its tests.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

# Type of a graph's value -> the ONNX number of the type of its elements, and their bytes.
TYPES: Mapping[str, tuple[int, int]] = {
    "tensor(float)": (1, 4),
    "tensor(int8)": (3, 1),
    "tensor(int32)": (6, 4),
    "tensor(int64)": (7, 8),
    "tensor(float16)": (10, 2),
    "tensor(bfloat16)": (16, 2),
}
UINT8 = (1, 8, 1)  # DLPack's code, bits and lanes of a byte
PROVIDER = "CUDAExecutionProvider"
CUDART = "libcudart.so.13"  # of the CUDA that requirements/gpu.txt is built for
CURE = (
    "It takes an NVIDIA driver, CUDA 13 and `pip install -r requirements/gpu.txt` in place of onnxruntime: "
    "docs/cuda.md. Or serve an artifact for the CPU with --device cpu"
)

Bytes = NDArray[np.uint8]


class Device(NamedTuple):
    """As ONNX Runtime calls it: "cpu" or "cuda", and its number."""

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


HOST = Device("cpu")


class DeviceUnavailable(Exception):
    """The device cannot compute here; the message says what is missing and the cure."""


def devices_of(text: str) -> list[Device]:
    """Those that `--device` names."""
    kind, _, numbers = text.partition(":")
    return [Device(kind, int(number)) for number in (numbers or "0").split(",")]


def open_device_session(path: Path, device: Device) -> ort.InferenceSession:
    """A session that captures CUDA graphs; on the host, one that runs the same graph there, with a thread.

    Raises DeviceUnavailable if the provider is not there, or ONNX Runtime would go on without it; and what ONNX Runtime
    raises, which refuses to capture a graph that has a node elsewhere.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    if device == HOST:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if PROVIDER not in ort.get_available_providers():
        raise DeviceUnavailable(
            f"{device} cannot be used: this onnxruntime {ort.__version__} has no {PROVIDER}. {CURE}"
        )
    ort.preload_dlls()  # those that pip installed
    wanted = {"device_id": str(device.number), "enable_cuda_graph": "1"}
    session = ort.InferenceSession(str(path), options, providers=[(PROVIDER, wanted)])
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDER:
        raise DeviceUnavailable(
            f"{device} cannot be used: {PROVIDER} did not load, and ONNX Runtime's log above says why. {CURE}"
        )
    return session


class DeviceArray:
    """An array [rows, ...] of a graph's value type."""

    def __init__(self, shape: Sequence[int], kind: str, device: Device) -> None:
        """`kind` is one of `TYPES`. What it holds is not defined."""
        self.shape = tuple(shape)
        self.element_type, size = TYPES[kind]
        self.row_bytes = math.prod(self.shape[1:]) * size
        self.nbytes = self.shape[0] * self.row_bytes
        self._device = device
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(self.shape, self.element_type, *device)
        self._place = self._value.__dlpack_device__()

    def bind(self, binding: ort.IOBinding, name: str, first: int, rows: int, *, output: bool = False) -> None:
        """Bind `rows` rows from `first` on as the graph's value `name`."""
        bind = binding.bind_output if output else binding.bind_input
        bind(name, *self._device, self.element_type, (rows, *self.shape[1:]), self._address(first))

    def write(self, values: NDArray[np.generic], first: int = 0) -> None:
        """Copy whole rows from the host."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._part(first, len(values)).update_inplace(flat)

    def read(self, first: int, rows: int, dtype: type[np.generic]) -> NDArray[np.generic]:
        """A copy of rows on the host."""
        found = np.array(self._part(first, rows).numpy()).view(dtype)
        return found.reshape(rows, *self.shape[1:])

    def copy_row(self, source: int, target: DeviceArray, row: int) -> None:
        """Copy a row into that of an array of the same kind on the same device."""
        target._part(row, 1).update_inplace(self._part(source, 1))

    def clear(self) -> None:
        """Zeros, row by row: the host never holds all of them."""
        zeros = np.zeros((1, self.row_bytes), np.uint8)
        for row in range(self.shape[0]):
            self.write(zeros, row)

    def _address(self, row: int) -> int:
        return int(self._value.data_ptr()) + row * self.row_bytes

    def _part(self, first: int, rows: int) -> ort.OrtValue:
        """Rows as bytes, without a copy. Raises IndexError beyond the end, where somebody else's memory is."""
        if first < 0 or rows < 1 or first + rows > self.shape[0]:
            raise IndexError(f"rows {first} to {first + rows} of an array of {self.shape[0]}")
        return _bytes_at(self._address(first), rows * self.row_bytes, self._place)


def free_bytes(device: Device) -> int:
    """Free memory of a CUDA device, by the driver. Raises OSError if there is no CUDA."""
    ort.preload_dlls()
    cudart = ctypes.CDLL(CUDART)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if cudart.cudaSetDevice(device.number) or cudart.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        raise OSError(f"CUDA device {device.number} does not answer; `nvidia-smi` lists those there are")
    return free.value


# -- DLPack: how a part of an allocation becomes a value -------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h, flattened."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_alive: dict[int, tuple[object, ...]] = {}  # descriptions of values that ONNX Runtime has not given back


def _forget(address: int) -> None:
    _alive.pop(address, None)


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_forget)


def _bytes_at(address: int, size: int, place: tuple[int, int]) -> ort.OrtValue:
    shape = (ctypes.c_int64 * 1)(size)
    deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    tensor = _Tensor(address, *place, 1, *UINT8, shape, None, 0, None, deleter)
    _alive[ctypes.addressof(tensor)] = tensor, shape
    return ort.OrtValue.from_dlpack(_new_capsule(ctypes.addressof(tensor), b"dltensor", None))
