"""Writing an ONNX graph: nodes are collected, weights go straight to the external data file.

Nothing large is held: `constant` writes and forgets, so building needs the memory of the caller's own arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from proto.manifest import GRAPH, WEIGHTS

MICROSOFT = "com.microsoft"
OPSET = 21
IR_VERSION = 10
ALIGNMENT = 4096  # bytes: what mapping a weight straight from the file needs
INLINE = 1024  # bytes: up to here a constant lives in the graph itself, where ONNX Runtime can fold it
BLOCK = 16 << 20  # bytes copied at a time when an array is not contiguous

Dimensions = Sequence[int | str]


class GraphBuilder:
    """Collects a graph and writes it as `model.onnx` with `model.onnx.data`. Use as a context manager, then `save`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._data = (directory / WEIGHTS).open("wb")

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._data.close()

    def input(self, name: str, dtype: Any, shape: Dimensions) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: Dimensions) -> str:
        self._outputs.append(_value_info(name, dtype, shape))
        return name

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer; a large one is on disk when this returns."""
        if name in self._constants:
            raise ValueError(f"constant {name} is added twice")
        if array.nbytes <= INLINE:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            return name
        self._data.write(bytes(-self._data.tell() % ALIGNMENT))
        offset = self._data.tell()
        rows = max(1, BLOCK * len(array) // array.nbytes)
        little_endian = array.dtype.newbyteorder("<")
        for start in range(0, len(array), rows):
            self._data.write(np.ascontiguousarray(array[start : start + rows], dtype=little_endian).data)
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._constants[name] = tensor
        return name

    def shared(self, name: str, array: NDArray[Any]) -> str:
        """A small constant that many nodes use: added once."""
        return name if name in self._constants else self.constant(name, array)

    def node(self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        return self.nodes(op, inputs, [output], domain=domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; an empty name skips one."""
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return list(outputs)

    def save(self) -> None:
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, initializer=list(self._constants.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, producer_name="pawl", opset_imports=opsets, ir_version=IR_VERSION)
        self._data.flush()
        (self.directory / GRAPH).write_bytes(model.SerializeToString())


def _value_info(name: str, dtype: Any, shape: Dimensions) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
