"""What each product costs on this machine at each precision, and how fast a whole recipe decodes.

Speed does not depend on what the weights are. So random ones are packed into the native graph of the checkpoint, with
all products at one precision, and ONNX Runtime's profiler tells the time of every product where it really runs: between
the others, with its weights as cold as they are in use. A recipe's step is then the sum over its products and the rest.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np
import onnxruntime as ort
from msgspec import Struct

from compress.candidates import STREAMS, Objective, offered, weight_bytes
from compress.checkpoint import Checkpoint, Floats
from compress.constants import WeightHook
from compress.decoder import build
from compress.families import Decoder
from compress.levels import STEPS as GRID_STEPS
from compress.levels import TOP, Weight4, Weight8
from compress.precisions import precision_of
from compress.treatment import Treatment
from proto.manifest import NATIVE_GRAPH, WEIGHTS, Architecture, Precision, Recipe
from serve.block_cache import blocks_for
from serve.native import library
from serve.native_runner import NativeRunner
from serve.plan import Plan
from serve.runner import open_session

CONTEXT = 128  # cached tokens of every stream
STEPS = 40  # of each measurement
ROUNDS = 5  # in which recipes take turns, so that what else the machine does meets all of them


class Speeds(Struct):
    """Seconds by objective: [precision][role] of one product, and of all else in a step; and bytes of all else."""

    products: dict[Objective, list[dict[str, float]]]
    rest: dict[Objective, float]
    rest_bytes: int


def uniform(decoder: Decoder, precision: Precision, precisions: Sequence[Precision]) -> Recipe:
    """One precision for all; the head has the first that it can have, if not this one."""
    products = {}
    if not offered(decoder, "head", precision):
        products["head"] = next(p for p in precisions if offered(decoder, "head", p))
    return Recipe(name="uniform", default=precision, products=products)


def measure(
    checkpoint: Checkpoint,
    decoder: Decoder,
    precisions: Sequence[Precision],
    *,
    threads: int,
    progress: Callable[[], None] = lambda: None,
) -> Speeds:
    """Build, profile and time one model after the other. Raises NativeUnavailable."""
    products: dict[Objective, list[dict[str, float]]] = {objective: [] for objective in STREAMS}
    rests: dict[Objective, list[float]] = {objective: [] for objective in STREAMS}
    for precision in precisions:
        recipe = uniform(decoder, precision, precisions)
        with tempfile.TemporaryDirectory(prefix="pawl-search-") as temporary:
            directory = Path(temporary)
            architecture = make_model(checkpoint, recipe, directory)
            stored = sum(weight_bytes(decoder, name, precision_of(recipe, name)) for name in decoder.products)
            rest_bytes = sum((directory / name).stat().st_size for name in (WEIGHTS, NATIVE_GRAPH)) - stored
            for objective, streams in STREAMS.items():
                by_role, step = profile(directory, architecture, decoder.roles, streams, threads)
                layers = sum(by_role[role] for role in decoder.roles) * decoder.num_layers
                rests[objective].append(max(step - layers - by_role["head"], 0.0))
                if "head" in recipe.products:
                    del by_role["head"]
                products[objective].append(by_role)
        progress()
    return Speeds(products, {objective: median(values) for objective, values in rests.items()}, rest_bytes)


def time_recipes(
    checkpoint: Checkpoint, recipes: Sequence[Recipe], *, threads: int, progress: Callable[[], None] = lambda: None
) -> list[dict[Objective, float]]:
    """Seconds of each recipe's decode step, the least of those measured in rounds."""
    found: list[dict[Objective, float]] = [{} for _ in recipes]
    with tempfile.TemporaryDirectory(prefix="pawl-search-") as temporary:
        models = []
        for number, recipe in enumerate(recipes):
            directory = Path(temporary) / str(number)
            directory.mkdir()
            models.append((directory, make_model(checkpoint, recipe, directory)))
            progress()
        for objective, streams in STREAMS.items():
            runs = [
                Decoding(open_session(directory, threads, NATIVE_GRAPH, library()), architecture, streams)
                for directory, architecture in models
            ]
            for _ in range(ROUNDS):
                for run, best in zip(runs, found, strict=True):
                    best[objective] = min(best.get(objective, np.inf), *run.steps(STEPS // ROUNDS))
    return found


def make_model(checkpoint: Checkpoint, recipe: Recipe, directory: Path) -> Architecture:
    """The graphs of the checkpoint with random weights."""
    hook = random_weights(recipe)
    return build(checkpoint, directory, recipe, treat=lambda _: Treatment(hook=hook))


def random_weights(recipe: Recipe) -> WeightHook:
    """Levels at random, and scales that keep the values of a product near those of its inputs."""
    random = np.random.default_rng(0)

    def weight_of(product: str, weight: Floats) -> Weight8 | Weight4:
        precision = precision_of(recipe, product)
        num_outputs, num_inputs = weight.shape
        if precision.weight_bits == 8:
            levels = random.integers(-127, 128, weight.shape, np.int8)
            return Weight8(levels, np.full(num_outputs, num_inputs**-0.5 / 74, np.float32))
        groups = (num_outputs, -(-num_inputs // precision.group))
        step, zero = (np.full(groups, value, np.uint8) for value in (GRID_STEPS[0], TOP // 2))
        scale = np.full(num_outputs, num_inputs**-0.5 / (4.6 * GRID_STEPS[0]), np.float32)
        return Weight4(random.integers(0, TOP + 1, weight.shape, np.uint8), scale, step, zero)

    return weight_of


class Decoding:
    """Some streams that decode together, the same step again and again."""

    def __init__(self, session: ort.InferenceSession, architecture: Architecture, streams: int) -> None:
        past = min(CONTEXT, architecture.max_context - 1)
        blocks = blocks_for(past + 1)
        self._runner = NativeRunner(session, architecture, num_blocks=streams * blocks, capacity=past + 1)
        self._plan = Plan()
        for stream in range(streams):
            self._plan.add(range(stream * blocks, (stream + 1) * blocks), past, [stream % architecture.vocab_size])

    def steps(self, number: int) -> list[float]:
        """Seconds of each."""
        found = []
        for _ in range(number):
            start = time.perf_counter()
            self._runner.run(self._plan)
            found.append(time.perf_counter() - start)
        return found


def profile(
    directory: Path, architecture: Architecture, roles: Sequence[str], streams: int, threads: int
) -> tuple[dict[str, float], float]:
    """(seconds of a product by role, of a step without the profiler), the least of all steps: what else the machine
    does only ever adds."""
    session = open_session(directory, threads, NATIVE_GRAPH, library(), profile=directory / "profile")
    decoding = Decoding(session, architecture, streams)
    decoding.steps(STEPS)
    events = json.loads(Path(session.end_profiling()).read_text())
    least: dict[str, float] = {}  # microseconds by node
    for event in events:
        node, _, kind = event["name"].rpartition("_kernel")
        if kind == "_time":
            least[node] = min(event["dur"], least.get(node, np.inf))
    seconds: dict[str, list[float]] = defaultdict(list)
    for node, micros in least.items():
        seconds["head" if node == "logits" else node.rpartition(".")[2]].append(micros / 1e6)
    return {role: mean(seconds[role]) for role in (*roles, "head")}, min(decoding.steps(STEPS))
