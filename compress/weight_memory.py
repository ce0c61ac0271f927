"""Constants in memory, for graphs that are run here and never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

from compress.weight_file import WeightStore


class WeightMemory(WeightStore):
    """Keeps the constants for as long as it lives; a session that `open` gave must not outlive it."""

    def __init__(self) -> None:
        super().__init__()
        self._arrays: dict[str, NDArray[Any]] = {}

    def open(self, model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
        """A session of a graph over these constants, which reads them where they lie."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # numpy computes between the runs
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # what a run needed is given back when it ends
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")  # which would copy every matrix
        outside = [t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        options.add_external_initializers(
            outside, [ort.OrtValue.ortvalue_from_numpy(self._arrays[name]) for name in outside]
        )
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _keep(self, name: str, array: NDArray[Any]) -> Mapping[str, str | int]:
        self._arrays[name] = np.ascontiguousarray(array)
        return {"location": "memory", "offset": 0}
