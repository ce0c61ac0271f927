"""Memory grows with the largest layer, not with the model: the peak of processes that quantize few and many layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.memory import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
HIDDEN = 896
LAYER_BYTES = 4 * 7 * HIDDEN**2

# Everything but the gate's own runners, which hold the artifact. GPTQ is left out for time.
PROGRAM = """
import sys
from pathlib import Path
from compress import quantize
from compress.checkpoint import Checkpoint
from compress.corpus import Corpus
from compress.decoder import build
from compress.families import describe
from compress.levels import round_to_nearest
from compress.product_errors import ErrorMeter
from compress.recipes import make_recipe
from compress.reference import Reference

quantize.round_compensating = lambda weight, moment: round_to_nearest(weight)
checkpoint = Checkpoint(Path(sys.argv[1]))
decoder = describe(checkpoint)
corpus = Corpus([list(range(64))] * 2, "")
recipe = make_recipe("w8a8", decoder)
treat = quantize.make_treat(checkpoint, decoder, recipe, corpus, ErrorMeter(recipe), quantize.Options(), 1)
build(checkpoint, Path(sys.argv[2]), recipe, treat=treat)
Reference(checkpoint, decoder, corpus.windows, threads=1).log_probabilities(0, 0, 64)
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(line.split()[1])
"""


def start(directory: Path, num_layers: int) -> subprocess.Popen[str]:
    write_checkpoint(directory, layers=num_layers, hidden=HIDDEN, inner=HIDDEN, heads=7, vocab=64)
    output = directory / "artifact"
    output.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(directory), str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_memory_grows_with_the_largest_layer_not_with_the_model(tmp_path: Path) -> None:
    processes = [start(tmp_path / str(num_layers), num_layers) for num_layers in (2, 8)]
    outputs = [process.communicate()[0] for process in processes]
    few, many = (1024 * int(output) for output in outputs)
    assert many - few < LAYER_BYTES, f"{many - few:,} bytes more for six layers of {LAYER_BYTES:,}"
