"""The native runner over a stand-in graph of stock operators, with the inputs and outputs of docs/native.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from proto.manifest import Architecture
from serve.native_runner import NativeRunner, block_shape
from serve.plan import Plan

VOCABULARY, HIDDEN = 100, 5
ARCHITECTURE = Architecture(
    family="llama",
    num_layers=2,
    num_heads=4,
    num_kv_heads=3,
    head_size=72,
    hidden_size=HIDDEN,
    vocab_size=VOCABULARY,
    max_context=256,
)
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)
STATES = np.random.default_rng(1).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)


def graph() -> onnx.ModelProto:
    """Logits and states are looked up by token; to every logit is added the sum of all segments, tables and bytes."""
    node, made = helper.make_node, helper.make_tensor_value_info
    shape = ["blocks", *block_shape(ARCHITECTURE)]
    inputs = [
        made("input_ids", TensorProto.INT64, ["tokens"]),
        made("segments", TensorProto.INT32, ["segments", 3]),
        made("blocks", TensorProto.INT32, ["segments", "width"]),
        made("logits_rows", TensorProto.INT64, ["rows"]),
        made("hidden_rows", TensorProto.INT64, ["hidden"]),
        made("temperature", TensorProto.FLOAT, ["rows"]),
        made("cache", TensorProto.UINT8, shape),
    ]
    outputs = [
        made("logits", TensorProto.FLOAT, ["rows", VOCABULARY]),
        made("candidates", TensorProto.INT32, ["rows", 64]),
        made("total", TensorProto.FLOAT, ["rows"]),
        made("hidden", TensorProto.FLOAT, ["hidden", HIDDEN]),
    ]
    nodes = [node("Cast", ["cache"], ["cache.int32"], to=TensorProto.INT32)]
    for name in ("segments", "blocks", "cache.int32"):
        nodes.append(node("ReduceSum", [name], [f"{name}.sum"], keepdims=0))  # noqa: PERF401
    nodes += [
        node("Sum", ["segments.f", "blocks.f", "cache.f"], ["offset"]),
        *(
            node("Cast", [f"{name}.sum"], [f"{to}.f"], to=TensorProto.FLOAT)
            for name, to in [("segments", "segments"), ("blocks", "blocks"), ("cache.int32", "cache")]
        ),
        node("Gather", ["input_ids", "logits_rows"], ["ids"]),
        node("Gather", ["table", "ids"], ["plain"]),
        node("Add", ["plain", "offset"], ["logits"]),
        node("TopK", ["logits", "k"], ["best", "best.ids"], axis=1),
        node("Cast", ["best.ids"], ["candidates"], to=TensorProto.INT32),
        node("ReduceMax", ["logits"], ["peak"], axes=[1], keepdims=1),
        node("Sub", ["logits", "peak"], ["shifted"]),
        node("Unsqueeze", ["temperature", "one"], ["t"]),
        node("Div", ["shifted", "t"], ["tempered"]),
        node("Exp", ["tempered"], ["weights"]),
        node("ReduceSum", ["weights", "one"], ["total"], keepdims=0),
        node("Gather", ["input_ids", "hidden_rows"], ["hidden.ids"]),
        node("Gather", ["states", "hidden.ids"], ["hidden"]),
    ]
    order = {n.output[0]: n for n in nodes}
    nodes = [n for n in nodes if n.output[0] != "offset"]
    nodes.insert(7, order["offset"])
    constants = [
        numpy_helper.from_array(TABLE, "table"),
        numpy_helper.from_array(STATES, "states"),
        numpy_helper.from_array(np.array([64]), "k"),
        numpy_helper.from_array(np.array([1]), "one"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "stand-in", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    return ort.InferenceSession(graph().SerializeToString(), providers=["CPUExecutionProvider"])


def check(runner: NativeRunner, plan: Plan, written: int = 0) -> None:
    """A run's results are those of the plan, and of `written`, the sum of the cache's bytes."""
    output = runner.run(plan)
    rows = list(output.rows)
    offset = written + sum(s.past + s.start + s.count + int(np.sum(s.blocks)) for s in plan.segments)
    expected = TABLE[[plan.tokens[at] for at in plan.wanted]] + np.float32(offset)
    np.testing.assert_allclose(output.logits[rows], expected, rtol=1e-6)
    assert output.candidates is not None
    assert output.total is not None
    for number, row in enumerate(rows):
        shifted = expected[number] - expected[number].max()
        assert output.candidates[row, 0] == expected[number].argmax()
        total = np.exp(shifted / (plan.temperatures[number] or 1)).sum()
        assert output.total[row] == pytest.approx(total, rel=1e-3)
    np.testing.assert_array_equal(output.hidden, STATES[[plan.tokens[at] for at in plan.hidden]])


def table(*blocks: int) -> Any:
    return np.array([*blocks, 0, 0, 0, 0][:4], np.int32)


def test_plans_of_all_kinds_reach_the_graph_and_come_back(session: ort.InferenceSession) -> None:
    runner = NativeRunner(session, ARCHITECTURE, num_blocks=6, capacity=256)
    random = np.random.default_rng(2)
    for size in (1, 1, 3, 40, 3, 1):  # grows, and comes back to counts already bound
        for _ in range(2):
            plan = Plan()
            for number in range(size):
                blocks, past = table(number % 6, 5), int(random.integers(0, 60))
                tokens = random.integers(0, VOCABULARY, int(random.integers(1, 5))).tolist()
                plan.add(blocks, past, tokens, want=random.choice(["last", "all", "hidden", "none"]), temperature=0.5)
            check(runner, plan)


def test_plans_that_want_nothing_or_are_nothing(session: ort.InferenceSession) -> None:
    runner = NativeRunner(session, ARCHITECTURE, num_blocks=6, capacity=256)
    plan = Plan()
    plan.add(table(3), 0, [1, 2, 3], want="none")
    check(runner, plan)
    assert list(runner.run(Plan()).rows) == []


def test_the_cache_is_aligned_zeroed_and_the_graphs(session: ort.InferenceSession) -> None:
    runner = NativeRunner(session, ARCHITECTURE, num_blocks=6, capacity=256)
    layers, kv_heads, size = block_shape(ARCHITECTURE)
    assert (layers, kv_heads, size) == (2, 3, 64 * (128 + 80) + 512)
    assert runner.kv_bytes == 6 * 2 * 3 * size
    assert runner._cache.ctypes.data % 64 == 0
    assert not runner._cache.any()
    runner._cache[5, 1, 2, -1] = 200  # as an operator would
    plan = Plan()
    plan.add(table(0), 3, [9], temperature=1.0)
    check(runner, plan, written=200)
