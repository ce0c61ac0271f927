"""From a Hugging Face checkpoint to a gated ONNX artifact."""
