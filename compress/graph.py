"""Making an ONNX graph: nodes are collected, and refer by name to the constants of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from compress.weight_file import WeightStore

MICROSOFT = "com.microsoft"
PAWL = "pawl"  # our own operators: docs/native.md
OPSETS: Mapping[str, int] = {"": 21, MICROSOFT: 1, PAWL: 1}
IR_VERSION = 10

Dimensions = Sequence[int | str]


class GraphBuilder:
    """Collects a graph over the constants of `weights`; `model` gives it whole, `save` writes it.

    Every constant that a node names becomes an initializer, so graphs over one file share what both use.
    """

    def __init__(self, weights: WeightStore) -> None:
        self.weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: Any, shape: Dimensions) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: Dimensions) -> str:
        self._outputs.append(_value_info(name, dtype, shape))
        return name

    def constant(self, name: str, array: NDArray[Any], *, as_it_is: bool = False) -> str:
        """Add a constant that this graph alone needs; `as_it_is`: float32 stays, whatever the graph's floats."""
        self.weights.add(name, array, as_it_is=as_it_is)
        return name

    def shared(self, name: str, array: NDArray[Any]) -> str:
        """A small constant that many nodes use: added once."""
        return name if name in self.weights else self.constant(name, array)

    def stored(self, name: str) -> str:
        """The name of a constant if the store has it, otherwise "", which leaves an optional input out."""
        return name if name in self.weights else ""

    def node(self, op: str, inputs: Sequence[str], output: str, /, *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        return self.nodes(op, inputs, [output], domain=domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], /, *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; an empty name skips one."""
        node = helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self._nodes.append(node)
        return list(outputs)

    def model(self) -> onnx.ModelProto:
        """The graph, with what it says of the constants that it uses."""
        used = dict.fromkeys(value for node in self._nodes for value in node.input if value in self.weights)
        initializers = [self.weights[value] for value in used]
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, initializer=initializers)
        domains = sorted({"", *(node.domain for node in self._nodes)})
        opsets = [helper.make_opsetid(domain, OPSETS[domain]) for domain in domains]
        return helper.make_model(graph, producer_name="pawl", opset_imports=opsets, ir_version=IR_VERSION)

    def save(self, path: Path) -> None:
        path.write_bytes(self.model().SerializeToString())


def _value_info(name: str, dtype: Any, shape: Dimensions) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
