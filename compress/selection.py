"""Choosing tokens on the device: the few largest logits of each row, and the sum that makes them probabilities.

What crosses to the host is then some hundreds of bytes a row, not the vocabulary. Inputs and outputs are those of the
operator `Select` of docs/native.md: `temperature` float32 [rows], above 0; `candidates` int32 [rows, k], the largest
first; `total` float32 [rows], the sum of exp((logit - largest) / temperature). `candidate_logits` [rows, k] goes with
them.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from compress.graph import GraphBuilder
from serve.native_runner import NUM_CANDIDATES


def select(graph: GraphBuilder, vocab_size: int) -> None:
    """Add the choice from `logits`, float32 [rows, vocabulary]."""
    g, count = graph, min(NUM_CANDIDATES, vocab_size)
    g.input("temperature", np.float32, ["rows"])
    g.output("candidates", np.int32, ["rows", count])
    g.output("candidate_logits", np.float32, ["rows", count])
    g.output("total", np.float32, ["rows"])
    last = g.shared("axis.last", np.array([-1], np.int64))
    many = g.constant("candidates.count", np.array([count], np.int64))
    g.nodes("TopK", ["logits", many], ["candidate_logits", "candidates.index"], axis=-1, largest=1, sorted=1)
    g.node("Cast", ["candidates.index"], "candidates", to=TensorProto.INT32)
    start, end = (
        g.constant(f"candidates.{name}", np.array([at], np.int64)) for name, at in (("first", 0), ("next", 1))
    )
    largest = g.node("Slice", ["candidate_logits", start, end, last], "total.largest")
    below = g.node("Sub", ["logits", largest], "total.below")
    scaled = g.node("Div", [below, g.node("Unsqueeze", ["temperature", last], "total.temperature")], "total.scaled")
    g.node("ReduceSum", [g.node("Exp", [scaled], "total.weights"), last], "total", keepdims=0)
