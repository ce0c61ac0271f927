"""Quantization-aware distillation: the levels of the weights are trained until the artifact says what the model says.

The student is the artifact's own arithmetic (compress/fake_quantization.py), beginning with the levels that rounding
chose. The teacher is the full-precision checkpoint, the loss KL(teacher || student) of all next tokens, and the loop
that of `python -m train run`. Grids stay as they are, so what was trained is what is exported.

Memory, in bytes a parameter: teacher 4, student 4, gradients 4, AdamW 8; the moments that rounding needs, [K, K] for
each product's K inputs; and the activations of one window.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from compress.checkpoint import Checkpoint, Floats
from compress.constants import Rounded, round_weight
from compress.fake_quantization import fake_quantize, levels_of
from compress.families import Decoder
from compress.native import has_native_form
from compress.precisions import is_float, precision_of
from compress.rotation import rotate
from compress.treatment import Treat
from compress.weights import Weights
from compress.window_batches import WindowBatches
from proto.manifest import Recipe
from train.distillation import DistillOptions, distill
from train.distributed import joined
from train.flops import dimensions, flops_per_token
from train.guard import Guard, GuardOptions
from train.loop import Training, train
from train.model import load_model
from train.optimizers import OptimizerOptions, make_optimizers
from train.options import Options
from train.peak import measure_peak
from train.tracker import Tracker, TrackerOptions

BATCH = 4  # windows in a step
LEARNING_RATE = 0.01  # levels: what AdamW moves a level by in a step


def distill_levels(
    checkpoint: Checkpoint,
    decoder: Decoder,
    recipe: Recipe,
    treat: Treat,
    windows: Sequence[Sequence[int]],
    *,
    steps: int,
    threads: int,
) -> dict[str, Rounded]:
    """What `treat` makes of all products that are not float, trained on token windows of one length but for the head.

    Raises TrainError if the loss diverges, and KeyboardInterrupt if a signal ended it.
    """
    scales: dict[str, Floats] = {}
    rounded: dict[str, Rounded] = {}
    for layer in (*range(decoder.num_layers), None):
        treatment = treat(layer)
        scales |= treatment.scales
        weights = Weights(checkpoint, decoder, treatment.scales)
        for product in products_of(decoder, layer):
            precision = precision_of(recipe, product)
            if not is_float(precision):
                weight = product_weight(decoder, weights, product)
                weight = rotate(weight) if precision.rotated else weight
                rounded[product] = round_weight(product, weight, precision, treatment.hook)
    return train_levels(
        checkpoint,
        decoder,
        recipe,
        Weights(checkpoint, decoder, scales),
        rounded,
        windows,
        steps=steps,
        threads=threads,
    )


def products_of(decoder: Decoder, layer: int | None) -> tuple[str, ...]:
    """Of a layer, or of what is behind the layers."""
    return ("head",) if layer is None else tuple(f"layers.{layer}.{role}" for role in ("qkv", "o", decoder.up, "down"))


def product_weight(decoder: Decoder, weights: Weights, product: str) -> Floats:
    """[N, K], migrated."""
    if product == "head":
        return weights.embedding() if decoder.tied else weights.head()
    _, layer, role = product.split(".")
    return weights.product(int(layer), role)[0]


def train_levels(
    checkpoint: Checkpoint,
    decoder: Decoder,
    recipe: Recipe,
    weights: Weights,
    rounded: Mapping[str, Rounded],
    windows: Sequence[Sequence[int]],
    *,
    steps: int,
    threads: int,
) -> dict[str, Rounded]:
    """`rounded` with the levels of the layers' products trained; `weights` has the migration of all layers."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    teacher = load_model(checkpoint.path, dtype=torch.float32).requires_grad_(False).eval()
    student = load_model(checkpoint.path, dtype=torch.float32)
    int8_cache = has_native_form(decoder, recipe)
    parts = fake_quantize(student.network, decoder, recipe, weights, rounded, int8_cache=int8_cache)
    with joined() as world, tempfile.TemporaryDirectory() as folder:
        options = Options(checkpoint=checkpoint.path, output=Path(folder), micro_batch=1, learning_rate=LEARNING_RATE)
        tracker = Tracker(options.output, TrackerOptions(tracker="none"), steps=steps)
        student.to(world.device)
        teacher.to(world.device)
        training = Training(
            options=options,
            world=world,
            model=student.train(),
            objective=distill(DistillOptions(), teacher),
            data=WindowBatches(windows, BATCH),
            held_out=None,
            optimizers=make_optimizers(student.named_parameters(), LEARNING_RATE, OptimizerOptions(weight_decay=0.0)),
            guard=Guard(GuardOptions()),
            checkpoints=None,
            steps=steps,
            eval_every=steps,
            eval_steps=0,
            dtype=torch.float32,
            flops_per_token=flops_per_token(dimensions(student.config), len(windows[0])),
            peak_flops=measure_peak(world.device, torch.float32),
        )
        try:
            done = train(training, tracker)
        finally:
            tracker.close()
    if not done:
        raise KeyboardInterrupt
    return {
        product: levels_of(parts[product], before) if product in parts else before
        for product, before in rounded.items()
    }
