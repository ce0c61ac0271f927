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
BLOCK = 16 << 20  # bytes copied at a time when an array is not contiguous


class WeightStore(ABC):
    """What a graph says of each constant; a subclass keeps the large ones."""

    def __init__(self) -> None:
        self._tensors: dict[str, onnx.TensorProto] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> onnx.TensorProto:
        """The initializer by which a graph refers to the constant."""
        return self._tensors[name]

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Add a constant. Raises ValueError for a name that is taken."""
        if name in self._tensors:
            raise ValueError(f"constant {name} is added twice")
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

    @abstractmethod
    def _keep(self, name: str, array: NDArray[Any]) -> Mapping[str, str | int]:
        """Keep a large array, and tell `location` and `offset`."""


class WeightFile(WeightStore):
    """Writes `model.onnx.data`; a large constant is on disk when `add` returns. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
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
        little_endian = array.dtype.newbyteorder("<")
        for start in range(0, len(array), rows):
            self._data.write(np.ascontiguousarray(array[start : start + rows], dtype=little_endian).data)
        self._data.flush()
        return {"location": WEIGHTS, "offset": offset}
