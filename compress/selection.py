"""Choosing tokens on the device: the few largest logits of each row, the sum that makes them probabilities, a guess.

What crosses to the host is then some hundreds of bytes a row, not the vocabulary. Inputs and outputs are those of the
operator `Select` of docs/native.md: `temperature` float32 [rows], above 0; `candidates` int32 [rows, k], the largest
first; `total` float32 [rows], the sum of exp((logit - largest) / temperature). `candidate_logits` [rows, k] goes with
them.

The host chooses, by more than the device knows. The device guesses what it will choose, so that the next run need not
wait: `share` and `top_p`, float32 [rows], are what the host's draw will take (serve/sampler.py), and `guesses` int32
[rows] the token of the candidates that it then is. A run's tokens are gathered: `tokens` int32 [known] are guesses of
the run before and tokens that the host knows, `token_rows` int32 [batch, sequence] says which is whose.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from compress.graph import GraphBuilder
from serve.native_runner import NUM_CANDIDATES

FLOAT = TensorProto.FLOAT


def input_tokens(graph: GraphBuilder) -> None:
    """Define `input_ids` [batch, sequence] as they come."""
    graph.input("input_ids", np.int64, ["batch", "sequence"])


def gather_tokens(graph: GraphBuilder) -> None:
    """Define `input_ids` [batch, sequence] by the tokens that are known, or were guessed."""
    graph.input("tokens", np.int32, ["known"])
    graph.input("token_rows", np.int32, ["batch", "sequence"])
    graph.node("Gather", ["tokens", "token_rows"], "input_ids")


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
    _guess(g, count, largest)


def _guess(graph: GraphBuilder, count: int, largest: str) -> None:
    """The candidate at which the walk by falling probability passes the draw's share of the mass, top_p cut off."""
    g = graph
    g.input("share", np.float32, ["rows"])
    g.input("top_p", np.float32, ["rows"])
    g.output("guesses", np.int32, ["rows"])
    last = g.shared("axis.last", np.array([-1], np.int64))

    def passed(limit: str, name: str) -> str:
        """How many candidates lie wholly below the limit, at most up to the last: int64 [rows, 1]."""
        column = g.node("Unsqueeze", [limit, last], f"{name}.column")
        below = g.node("Cast", [g.node("LessOrEqual", [sums, column], f"{name}.below")], f"{name}.ones", to=FLOAT)
        number = g.node("Min", [g.node("ReduceSum", [below, last], f"{name}.sum", keepdims=1), end], f"{name}.number")
        return g.node("Cast", [number], f"{name}.place", to=TensorProto.INT64)

    end = g.constant("guess.end", np.array(count - 1, np.float32), as_it_is=True)
    one = g.constant("guess.one", np.array(1, np.float32), as_it_is=True)
    scaled = g.node("Sub", ["candidate_logits", largest], "guess.below")
    scaled = g.node("Div", [scaled, "total.temperature"], "guess.scaled")
    weights = g.node("Exp", [scaled], "guess.weights")
    sums = g.node("CumSum", [weights, g.shared("axis.one", np.array(1, np.int64))], "guess.sums")
    least = g.node("Mul", ["top_p", "total"], "guess.least")
    last_kept = g.node("GatherElements", [sums, passed(least, "guess.kept")], "guess.to_last_kept", axis=1)
    # What is kept weighs just more than `least`: take that where the last one of it is not among the candidates.
    kept = g.node("Max", [g.node("Squeeze", [last_kept, last], "guess.known"), least], "guess.weight_of_kept")
    is_cut = g.node("Less", ["top_p", one], "guess.is_cut")
    mass = g.node("Where", [is_cut, kept, "total"], "guess.mass")
    place = passed(g.node("Mul", ["share", mass], "guess.share_of_mass"), "guess.drawn")
    token = g.node("GatherElements", ["candidates", place], "guess.token", axis=1)
    g.node("Squeeze", [token, last], "guesses")
