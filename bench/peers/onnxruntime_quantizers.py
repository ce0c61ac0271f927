"""ONNX Runtime's own quantizers on a float32 graph: SOURCE TARGET FORM. Run by the interpreter of ONNX Runtime GenAI's
environment, which has what they import; 4 bits are asymmetric by blocks of 32, as ours.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, matmul_nbits_quantizer, quantize_dynamic

BLOCK = 32
INT8_PRODUCT = 4  # the accuracy level that computes with int8 activations


def untie(model: onnx.ModelProto) -> onnx.ModelProto:
    """With a matrix of its own for the head: the dynamic quantizer turns it in place, and so spoils the embedding."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gemm":
            turned = np.ascontiguousarray(numpy_helper.to_array(constants[node.input[1]]).T)
            model.graph.initializer.append(numpy_helper.from_array(turned, "head.turned"))
            product = helper.make_node("MatMul", [node.input[0], "head.turned"], node.output, node.name)
            node.CopyFrom(product)
    return model


def main() -> None:
    source, target, form = sys.argv[1:]
    if form == "int8 dynamic":
        quantize_dynamic(
            untie(onnx.load(source)),
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # none are inferred behind ORT's own operators
        )
        return
    shared: dict[str, Any] = {"block_size": BLOCK, "is_symmetric": False, "accuracy_level": INT8_PRODUCT}
    config = (
        matmul_nbits_quantizer.KQuantWeightOnlyQuantConfig()
        if form == "int4 k-quant"
        else matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(**shared)
    )
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(onnx.load(source), algo_config=config, **shared)
    quantizer.process()
    quantizer.model.save_model_to_file(target, True)


if __name__ == "__main__":
    main()
