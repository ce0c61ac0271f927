"""`python -m bench.memory`: the memory that `compress quantize` needs, by the number of layers.

Writes random checkpoints that differ in their number of layers alone, one shard a layer, and quantizes each in a
process of its own. A phase's figure is the most that was resident while it ran, mapped files included. `quantize`
calibrates, rounds and writes; `reference` streams the float32 model over the held-out text; `gate` does so twice, and
runs the artifact's forms beside it, which map their weights and, in the portable form, unpack them. Prints a line a
checkpoint, then the whole as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bench.machine import describe as describe_machine
from compress.checkpoint import CONFIG, INDEX, Checkpoint
from compress.decoder import build
from compress.families import describe
from compress.product_errors import ErrorMeter
from compress.quantize import Options, corpora, examine_artifact, make_treat
from compress.recipes import RECIPES_OF, make_recipe
from compress.reference import Reference
from proto.manifest import TOKENIZER
from serve.machine import cpu_quota
from serve.tokenizer import Tokenizer


def write_checkpoint(directory: Path, *, layers: int, hidden: int, inner: int, heads: int, vocab: int) -> int:
    """A random Llama in bfloat16, the matrices of all its layers alike; gives its number of parameters."""
    directory.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (directory / CONFIG).write_text(json.dumps(config))
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        values = random.standard_normal((rows, columns), np.float32)
        return (values * np.float32(columns**-0.5)).astype(ml_dtypes.bfloat16)

    ones = np.ones(hidden, ml_dtypes.bfloat16)
    layer = {f"self_attn.{x}_proj.weight": matrix(hidden, hidden) for x in "qkvo"}
    layer |= {f"mlp.{x}_proj.weight": matrix(inner, hidden) for x in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": matrix(hidden, inner)}
    layer |= {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones}
    shards = {"ends": {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": ones}}
    shards |= {str(i): {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()} for i in range(layers)}
    for name, tensors in shards.items():
        save_file(tensors, directory / f"{name}.safetensors")
    weight_map = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.size for tensors in shards.values() for tensor in tensors.values())


def measure(source: Path, options: Options) -> dict[str, Any]:
    """Peak bytes and seconds of each phase; wants a process of its own."""
    checkpoint, threads = Checkpoint(source), cpu_quota()[0]
    decoder = describe(checkpoint)
    recipe = make_recipe(options.recipe, decoder)
    calibration, held_out = corpora(options, Tokenizer(source))
    with tempfile.TemporaryDirectory(dir=source) as temporary:
        artifact = Path(temporary)
        phases: dict[str, Callable[[], object]] = {
            "quantize": lambda: build(
                checkpoint,
                artifact,
                recipe,
                treat=make_treat(checkpoint, decoder, recipe, calibration, ErrorMeter(recipe), options, threads),
            ),
            "reference": lambda: Reference(checkpoint, decoder, held_out.windows, threads=threads),
            "gate": lambda: examine_artifact(checkpoint, artifact, decoder, held_out, threads),
        }
        return {name: peak_of(phase) for name, phase in phases.items()}


def peak_of(phase: Callable[[], object]) -> dict[str, float]:
    """The most that this process had resident while `phase` ran, and how long that was."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
    start = time.monotonic()
    phase()
    seconds = round(time.monotonic() - start, 1)
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return {"peak_bytes": 1024 * kibibytes, "seconds": seconds}


def main() -> int:
    shared = Options()
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Memory of quantizing, by layers.")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 40], help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1536, help="(default: %(default)s)")
    parser.add_argument("--inner", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("models/base"), help="whose to take (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where to write checkpoints (default: the system's for such)")
    parser.add_argument("--recipe", default=RECIPES_OF["cpu"][0], help="(default: %(default)s)")
    parser.add_argument(
        "--calibration-windows", type=int, default=shared.calibration_windows, help="(default: %(default)s)"
    )
    parser.add_argument("--held-out-windows", type=int, default=4, help="(default: %(default)s)")
    args = parser.parse_args()
    windows = {"calibration_windows": args.calibration_windows, "held_out_windows": args.held_out_windows}
    options = Options(recipe=args.recipe, force=True, **windows)
    vocab = Tokenizer(args.tokenizer).vocab_size
    results = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            source = Path(temporary) / "checkpoint"
            sizes = {"layers": layers, "hidden": args.hidden, "inner": args.inner, "heads": args.heads, "vocab": vocab}
            parameters = write_checkpoint(source, **sizes)
            shutil.copyfile(args.tokenizer / TOKENIZER, source / TOKENIZER)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                phases = pool.submit(measure, source, options).result()
        results.append({**sizes, "parameters": parameters, "phases": phases})
        peaks = [f"{name} {x['peak_bytes'] / 2**20:,.0f} MiB in {x['seconds']:,.0f} s" for name, x in phases.items()]
        print(f"{layers} layers, {parameters / 1e6:,.0f} M parameters: {', '.join(peaks)}", flush=True)
    print(json.dumps({"machine": describe_machine(), "recipe": args.recipe, **windows, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
