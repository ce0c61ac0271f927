"""From a checkpoint to a published artifact: calibrate, migrate, build, judge, publish.

Everything is made in a temporary folder beside the output and renamed as the last act, so that a directory that
exists is whole, and a failed gate publishes nothing.
"""

from __future__ import annotations

import datetime
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from compress.calibration import Activations, calibrate, tap_inputs
from compress.checkpoint import Checkpoint, Floats
from compress.constants import WeightHook
from compress.corpus import Corpus, default_texts, make_corpus, split_texts
from compress.decoder import build
from compress.families import Decoder, describe
from compress.gate import judge
from compress.levels import Weight4, Weight8
from compress.precisions import FLOAT, precision_of
from compress.recipes import make_recipe
from compress.rotation import rotate
from compress.rounding import round_by_group_compensating, round_compensating
from compress.smoothing import search_layer
from compress.weights import Weights
from proto.manifest import (
    CHAT_TEMPLATE,
    FORMAT_VERSION,
    MANIFEST,
    NATIVE_GRAPH,
    TOKENIZER,
    Form,
    GateReport,
    KvCacheType,
    Lineage,
    Manifest,
    Recipe,
    encode,
    list_files,
)
from serve.block_cache import blocks_for
from serve.native import NativeUnavailable, library
from serve.native_runner import NativeRunner
from serve.plan import Runner
from serve.runner import StockRunner, open_session
from serve.tokenizer import Tokenizer

TOOLS = ("onnx", "onnxruntime", "numpy", "safetensors")


class GateFailed(Exception):
    """The artifact is worse than the thresholds allow; nothing was published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of `python -m compress quantize`, each default written here alone."""

    recipe: str = "w8a8"
    kv: KvCacheType = "int8"
    name: str = ""
    text: Path | None = None
    window: int = 512  # tokens of context in calibration and gate
    calibration_windows: int = 8
    held_out_windows: int = 16
    calibration_rows: int = 256
    force: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a number that is too small."""
        for name, least in (
            ("window", 2),
            ("calibration_windows", 1),
            ("held_out_windows", 1),
            ("calibration_rows", 1),
        ):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} is too small; give at least {least}")


def quantize(source: Path, target: Path, options: Options, *, command: str, threads: int) -> Manifest:
    """Make the artifact `target` from the Hugging Face directory `source`.

    Raises CheckpointError or ValueError for bad input, FileExistsError if `target` is there, and GateFailed.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another output")
    checkpoint = Checkpoint(source)
    decoder = describe(checkpoint)
    if options.window > decoder.max_position:
        raise ValueError(f"--window {options.window} is beyond the model's {decoder.max_position} tokens; give less")
    recipe = make_recipe(options.recipe, decoder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        work = Path(temporary)
        reference, artifact = work / "reference", work / "artifact"
        reference.mkdir()
        artifact.mkdir(mode=0o755)
        copy_tokenizer(source, artifact)
        tokenizer = Tokenizer(artifact)
        calibration, held_out = corpora(options, tokenizer)
        scales: dict[str, Floats] = {}
        activations: Activations | None = None
        hook: WeightHook | None = None
        if recipe.default != FLOAT or options.kv == "int8":
            with tqdm(total=len(calibration.windows), desc="calibrate", unit="window") as bar:
                full = Recipe(name="fp32", default=FLOAT)
                build(checkpoint, reference, full, max_context=options.window, taps=tap_inputs)
                activations = calibrate(
                    reference,
                    decoder,
                    calibration.windows,
                    rows=options.calibration_rows,
                    threads=threads,
                    progress=bar.update,
                )
            shutil.rmtree(reference)
            reference.mkdir()
        if recipe.default != FLOAT and activations is not None:
            scales = migrate(checkpoint, decoder, recipe, activations)
            hook = compensating_hook(recipe, activations, scales)
        kv_scales = activations.kv_scales if activations is not None and options.kv == "int8" else None
        architecture = build(
            checkpoint, artifact, recipe, kv=options.kv, kv_scales=kv_scales, scales=scales, weight_hook=hook
        )
        build(checkpoint, reference, Recipe(name="fp32", default=FLOAT), max_context=options.window)
        gate = run_gate(reference, artifact, decoder, held_out, options, threads)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=options.name or target.name,
            architecture=architecture,
            recipe=recipe,
            kv_cache=options.kv,
            target="cpu",
            files=list_files(artifact),
            lineage=Lineage(
                checkpoint=checkpoint.digest,
                datasets={"calibration": calibration.digest, "held_out": held_out.digest},
                tools={"python": platform.python_version(), **{tool: version(tool) for tool in TOOLS}},
                command=command,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ),
            gate=gate,
        )
        if not gate.passed and not options.force:
            raise GateFailed(f"the gate failed and nothing was published: {figures(gate)}; --force publishes anyway")
        (artifact / MANIFEST).write_bytes(encode(manifest))
        artifact.rename(target)
    return manifest


def corpora(options: Options, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """Calibration and held-out windows."""
    sides = split_texts(read_text(options.text)) if options.text else default_texts()
    counts = (options.calibration_windows, options.held_out_windows)
    first, second = (
        make_corpus(texts, tokenizer, num_windows=count, window=options.window)
        for texts, count in zip(sides, counts, strict=True)
    )
    return first, second


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8: {error}") from error


def migrate(checkpoint: Checkpoint, decoder: Decoder, recipe: Recipe, activations: Activations) -> dict[str, Floats]:
    """Search the migration of every layer."""
    weights = Weights(checkpoint, decoder, {})
    scales: dict[str, Floats] = {}
    for layer in tqdm(range(decoder.num_layers), desc="smooth", unit="layer"):
        scales |= search_layer(decoder, weights, layer, activations.inputs, recipe)
    return scales


def compensating_hook(recipe: Recipe, activations: Activations, scales: dict[str, Floats]) -> WeightHook:
    """Rounds each product's weight so that errors cancel on the calibration inputs; the head stays nearest."""

    def round_weight(product: str, weight: Floats) -> Weight8 | Weight4 | None:
        if product not in activations.moments:
            return None  # the head, which may be the embedding too
        precision = precision_of(recipe, product)
        moment = activations.moments[product]
        if product in scales:
            moment = moment / np.outer(scales[product], scales[product])
        if precision.rotated:
            moment = rotate(rotate(moment).T)
        if precision.group:
            return round_by_group_compensating(weight, moment, precision.group)
        return round_compensating(weight, moment)

    return round_weight


def run_gate(
    reference: Path, artifact: Path, decoder: Decoder, held_out: Corpus, options: Options, threads: int
) -> GateReport:
    """Judge every form that runs here, the one that would be served first."""
    architecture = decoder.architecture(options.window)

    def stock(directory: Path) -> StockRunner:
        session = open_session(directory, threads)
        return StockRunner(session, architecture, num_slots=1, capacity=options.window, max_rows=options.window)

    candidates: dict[Form, Runner] = {"stock": stock(artifact)}
    if (artifact / NATIVE_GRAPH).exists():
        try:
            session = open_session(artifact, threads, NATIVE_GRAPH, library())
            blocks = blocks_for(options.window)
            native = NativeRunner(session, architecture, num_blocks=blocks, capacity=options.window)
            candidates = {"native": native, **candidates}
        except NativeUnavailable as reason:
            print(f"compress: the native form is not judged: {reason}", file=sys.stderr)
    with tqdm(total=len(held_out.windows), desc="gate", unit="window") as bar:
        return judge(stock(reference), candidates, held_out.windows, forced=options.force, progress=bar.update)


def copy_tokenizer(source: Path, artifact: Path) -> None:
    """The tokenizer and, if the model chats, its template, from where transformers keeps them."""
    if not (source / TOKENIZER).is_file():
        raise ValueError(f"{source} has no {TOKENIZER}; save it with a fast tokenizer")
    shutil.copyfile(source / TOKENIZER, artifact / TOKENIZER)
    template = source / CHAT_TEMPLATE
    config = source / "tokenizer_config.json"
    if template.is_file():
        shutil.copyfile(template, artifact / CHAT_TEMPLATE)
    elif config.is_file() and isinstance(text := msgspec.json.decode(config.read_bytes()).get("chat_template"), str):
        (artifact / CHAT_TEMPLATE).write_text(text)


def figures(gate: GateReport) -> str:
    """The gate in one line."""
    return ", ".join(
        f"{name} {value:g}" + (f" (limit {gate.thresholds[name]:g})" if name in gate.thresholds else "")
        for name, value in gate.metrics.items()
    )
