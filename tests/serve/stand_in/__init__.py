"""ONNX Runtime's CUDA provider on a machine without a GPU: what it takes, captures and moves, though not computes."""
