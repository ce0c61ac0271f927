"""From a checkpoint to a published artifact: calibrate, migrate, build, judge, publish.

Everything is made in a temporary folder beside the output and renamed as the last act, so that a directory that
exists is whole, and a failed gate publishes nothing.
"""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import msgspec
import numpy as np
from tqdm import tqdm

from compress import speed
from compress.accuracy_levels import choose
from compress.artifact_folder import artifact_folder, copy_tokenizer
from compress.blocks import round_blocks_compensating
from compress.budget import default_budget, parse
from compress.calibration import Calibration
from compress.checkpoint import Checkpoint, CheckpointError, Floats
from compress.constants import Rounded, WeightHook
from compress.corpus import Corpus, cut_windows, make_corpus, shuffled, sides_of
from compress.decoder import build
from compress.families import Decoder, describe
from compress.gate import Evidence, examine
from compress.precisions import is_float, is_weight_only, precision_of
from compress.product_errors import ErrorMeter
from compress.recipes import RECIPES_OF, cache_type, check_target, make_recipe
from compress.reference import Reference
from compress.report import write_report
from compress.rotation import rotate
from compress.rounding import round_by_group_compensating, round_compensating
from compress.runners import forms_here, open_streams
from compress.smoothing import balance_layer
from compress.treatment import Treat, Treatment, leave
from compress.verdict import can_judge, pass_judgement
from compress.weights import Weights
from proto.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Architecture,
    Form,
    GateReport,
    KvCacheType,
    Lineage,
    Manifest,
    Recipe,
    Target,
    encode,
    list_files,
)
from serve.device_session import devices_of, open_stream
from serve.device_stream import HOST, Device
from serve.tokenizer import Tokenizer
from train.folders import refuse_existing

TOOLS = ("onnx", "onnxruntime", "numpy", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of `python -m compress quantize`, each default written here alone."""

    target: Target = "cpu"
    recipe: str = ""  # by default the target's first
    kv: KvCacheType | Literal[""] = ""  # by default the recipe's: compress/recipes.py
    name: str = ""
    text: Path | None = None
    window: int = 512  # tokens of context in calibration and gate
    calibration_windows: int = 24
    held_out_windows: int = 16
    distill_steps: int = 0  # of quantization-aware distillation; 0: none
    gate: str = ""  # limits; by default those of the recipe
    gate_device: str = "cpu"  # where the gate runs an artifact for CUDA
    force: bool = False
    ungated: bool = False
    measure: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a number that is too small."""
        for name, least in (
            ("window", 2),
            ("calibration_windows", 1),
            ("held_out_windows", 2),  # one tells nothing of how far figures vary
            ("distill_steps", 0),
        ):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} is too small; give at least {least}")
        if self.gate:
            parse(self.gate)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.gate_device):
            raise ValueError(f"--gate-device {self.gate_device} is not one device; give cpu, cuda or cuda:1")
        if self.gate_device != "cpu" and self.target == "cpu":
            raise ValueError(
                f"--gate-device {self.gate_device} is for artifacts for CUDA and --target is cpu; leave it out, or "
                "give --target cuda"
            )


def quantize(source: Path, target: Path, options: Options, *, command: str, threads: int) -> Manifest:
    """Make the artifact `target` from the Hugging Face directory `source`.

    Raises CheckpointError or ValueError for bad input, TrainError if `target` is there, OSError that names the room if
    it does not suffice, DeviceUnavailable, and GateFailed.
    """
    refuse_existing(target)
    checkpoint = Checkpoint(source)
    decoder = describe(checkpoint)
    decoder.check_window(options.window)
    recipe = make_recipe(options.recipe or RECIPES_OF[options.target][0], decoder)
    check_target(recipe, options.target)
    kv_cache = cache_type(options.kv, recipe)
    [device] = devices_of(options.gate_device)
    open_stream(device)  # an error now, not after the work
    is_judged = can_judge(recipe, device, ungated=options.ungated)
    if options.distill_steps and is_float(recipe.default):
        raise ValueError(f"--distill-steps trains integer weights, and recipe {recipe.name} has none; leave it out")
    budget = parse(options.gate) if options.gate else default_budget(recipe)
    with artifact_folder(target) as artifact:
        tokenizer = copy_tokenizer(source, artifact)
        if tokenizer.vocab_size > decoder.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {source} has {tokenizer.vocab_size:,} tokens, and the model {decoder.vocab_size:,}: "
                "they are not of one model. Fetch both again."
            )
        calibration, held_out = corpora(options, tokenizer)
        meter = ErrorMeter(recipe)
        trained: dict[str, Rounded] = {}
        treat = make_treat(checkpoint, decoder, recipe, calibration, meter, options, threads, trained)
        if options.distill_steps:
            treat = cache(treat)
            trained |= distill(checkpoint, decoder, recipe, treat, tokenizer, options, threads)
        architecture = build(checkpoint, artifact, recipe, treat=treat)
        del treat
        evidence = examine_artifact(checkpoint, artifact, decoder, held_out, threads, device) if is_judged else None
        gate = None if evidence is None else pass_judgement(evidence, budget, forced=options.force)
        if gate and evidence and options.measure and options.target == "cpu":
            gate = with_serving(gate, artifact, architecture, evidence.scores, threads)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=options.name or target.name,
            architecture=architecture,
            recipe=recipe,
            kv_cache=kv_cache,
            target=options.target,
            files={},
            lineage=Lineage(
                checkpoint=checkpoint.digest,
                datasets={"calibration": calibration.digest, "held_out": held_out.digest},
                tools={"python": platform.python_version(), **{tool: version(tool) for tool in TOOLS}},
                command=command,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ),
            gate=gate,
        )
        if gate and evidence:
            write_report(artifact, manifest, gate, evidence, decoder, meter.errors)
        manifest = msgspec.structs.replace(manifest, files=list_files(artifact))
        (artifact / MANIFEST).write_bytes(encode(manifest))
    return manifest


def corpora(options: Options, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """Calibration and held-out windows."""
    for_calibration, held_out = sides_of(options.text)
    first = make_corpus(
        for_calibration, tokenizer, "calibration", num_windows=options.calibration_windows, window=options.window
    )
    second = make_corpus(held_out, tokenizer, "held-out", num_windows=options.held_out_windows, window=options.window)
    return first, second


def make_treat(
    checkpoint: Checkpoint,
    decoder: Decoder,
    recipe: Recipe,
    calibration: Corpus,
    meter: ErrorMeter,
    options: Options,
    threads: int,
    trained: Mapping[str, Rounded] = MappingProxyType({}),
) -> Treat:
    """Calibrates each layer when it is asked for: migrates, rounds so that errors cancel, measures keys and values.

    Products that are in `trained` when they are rounded are taken from there.
    """
    rounds, int8_caches = not is_float(recipe.default), cache_type(options.kv, recipe) == "int8"
    if not rounds and not int8_caches:
        return leave
    walk = Calibration(checkpoint, decoder, calibration.windows, threads=threads)
    weights = Weights(checkpoint, decoder, {})

    def treat(layer: int | None) -> Treatment:
        if layer is None:
            if not rounds:
                return Treatment()
            return Treatment(hook=meter.watch(compensating_hook(recipe, {"head": walk.head_moment()}, {}, trained)))
        activations = walk.next_layer()
        kv_scales = activations.kv_scales if int8_caches else None
        if not rounds:
            return Treatment(kv_scales=kv_scales)
        scales = balance_layer(decoder, weights, layer, activations.moments, recipe)
        hook = meter.watch(compensating_hook(recipe, activations.moments, scales, trained), activations.inputs, scales)
        levels = choose(decoder, weights, layer, activations.inputs, recipe)
        return Treatment(scales, hook, levels, kv_scales)

    return treat


def distill(
    checkpoint: Checkpoint,
    decoder: Decoder,
    recipe: Recipe,
    treat: Treat,
    tokenizer: Tokenizer,
    options: Options,
    threads: int,
) -> dict[str, Rounded]:
    """Levels that were trained, by product; on all windows that the calibration side has, if so many are needed."""
    from compress.quantization_aware import BATCH, distill_levels  # torch, which nothing else here needs

    texts = shuffled(sides_of(options.text)[0])
    windows = list(islice(cut_windows(texts, tokenizer, options.window), options.distill_steps * BATCH))
    return distill_levels(checkpoint, decoder, recipe, treat, windows, steps=options.distill_steps, threads=threads)


def compensating_hook(
    recipe: Recipe,
    moments: Mapping[str, Floats],
    scales: Mapping[str, Floats],
    trained: Mapping[str, Rounded] = MappingProxyType({}),
) -> WeightHook:
    """Rounds weights so that errors cancel on the calibration inputs, but for those that are `trained`."""

    def round_weight(product: str, weight: Floats) -> Rounded:
        if product in trained:
            return trained[product]
        precision = precision_of(recipe, product)
        moment = moments[product]
        if product in scales:
            moment = moment / np.outer(scales[product], scales[product])
        if precision.rotated:
            moment = rotate(rotate(moment).T)
        if is_weight_only(precision):
            return round_blocks_compensating(weight, moment, precision.group, precision.weight_bits)
        if precision.group:
            return round_by_group_compensating(weight, moment, precision.group)
        return round_compensating(weight, moment)

    return round_weight


def examine_artifact(
    checkpoint: Checkpoint, artifact: Path, decoder: Decoder, held_out: Corpus, threads: int, device: Device = HOST
) -> Evidence[Form]:
    """Every form that runs here, the one that would be served first."""
    count, window = len(held_out.windows), max(map(len, held_out.windows))
    architecture = decoder.architecture(window)
    candidates = {
        form: open_streams(artifact, form, architecture, streams=count, capacity=window, threads=threads, device=device)
        for form in forms_here(artifact)
    }
    with tqdm(total=count * (1 + len(candidates)), desc="gate", unit="text", disable=None) as bar:
        return examine(
            lambda windows: Reference(checkpoint, decoder, windows, threads=threads),
            candidates,
            held_out.windows,
            eos=architecture.eos_token_ids,
            progress=bar.update,
        )


def with_serving(
    gate: GateReport, artifact: Path, architecture: Architecture, forms: Iterable[Form], threads: int
) -> GateReport:
    """The report with what serving each form takes here."""
    serving = {form: speed.measure(artifact, architecture, form, threads) for form in forms}
    return msgspec.structs.replace(gate, machine=speed.machine(threads), serving=serving)
