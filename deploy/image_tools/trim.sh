#!/bin/sh
# Take out of a folder of libraries what no program of ours runs: their tests, headers, stubs and symbols.
set -eu
cd "$1"
find . -depth -type d \( -name tests -o -name test -o -name __pycache__ \) -not -path './torch/*' -exec rm -rf {} +
find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.a' \) -delete
rm -rf bin onnxruntime/transformers onnxruntime/tools onnxruntime/quantization onnxruntime/datasets
# The libraries that auditwheel moved (*.libs) break when they are stripped.
find . -name '*.so' -not -path '*.libs/*' -not -path './torch/*' -exec strip --strip-unneeded {} +
