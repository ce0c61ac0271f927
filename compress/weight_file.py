"""The constants of graphs: each is added once, and any number of graphs refer to it by name.

Those of an artifact go to its data file. Nothing large is held: `add` writes and forgets, so building needs the memory
of the caller's own arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from proto.manifest import WEIGHTS

ALIGNMENT = 4096  # bytes: what mapping a weight straight from the file needs
INLINE = 1024  # bytes: up to here a constant lives in the graphs themselves
FLOAT32 = np.dtype(np.float32)
BLOCK = 16 << 20  # bytes copied at a time when an array is not contiguous


class WeightStore(ABC):
    """What a graph says of each constant; a subclass keeps the large ones."""

    def __init__(self, floats: np.dtype[Any] = FLOAT32) -> None:
        """`floats`: the type in which float32 constants are stored."""
        self.floats = floats
        self._tensors: dict[str, onnx.TensorProto] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> onnx.TensorProto:
        """The initializer by which a graph refers to the constant."""
        return self._tensors[name]

    def add(self, name: str, array: NDArray[Any], *, as_it_is: bool = False) -> None:
        """Add a constant. Raises ValueError for a name that is taken, and for numbers too large for their type."""
        if name in self._tensors:
            raise ValueError(f"constant {name} is added twice")
        if array.dtype == FLOAT32 and not as_it_is:
            array = self._convert(name, array)
        if array.nbytes <= INLINE:
            self._tensors[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            return
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (*self._keep(name, array).items(), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._tensors[name] = tensor

    def _convert(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        if self.floats == FLOAT32:
            return array
        with np.errstate(over="ignore"):
            converted = array.astype(self.floats)
        if not np.isfinite(converted).all():
            largest = np.abs(array).max()
            raise ValueError(
                f"{name} holds {largest:g}, beyond {self.floats}; use recipe bf16, which has float32's range"
            )
        return converted

    @abstractmethod
    def _keep(self, name: str, array: NDArray[Any]) -> Mapping[str, str | int]:
        """Keep a large array, and tell `location` and `offset`."""


class WeightFile(WeightStore):
    """Writes `model.onnx.data`; a large constant is on disk when `add` returns. Use as a context manager."""

    def __init__(self, directory: Path, floats: np.dtype[Any] = FLOAT32) -> None:
        super().__init__(floats)
        self.directory = directory
        self._data = (directory / WEIGHTS).open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._data.close()

    def _keep(self, name: str, array: NDArray[Any]) -> Mapping[str, str | int]:
        self._data.write(bytes(-self._data.tell() % ALIGNMENT))
        offset = self._data.tell()
        rows = max(1, BLOCK * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            self._data.write(np.ascontiguousarray(array[start : start + rows]).view(np.uint8).data)
        self._data.flush()
        return {"location": WEIGHTS, "offset": offset}
