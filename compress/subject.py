"""What is searched: a checkpoint, the text to measure and judge by, and all that is measured of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from compress import measurements, sensitivity, speeds
from compress.artifact_folder import copy_tokenizer
from compress.calibration import Calibration
from compress.candidates import Candidates, native_precisions, offered
from compress.checkpoint import Checkpoint
from compress.corpus import make_corpus, sides_of_search
from compress.decoder import build
from compress.families import describe
from compress.measurements import Judged, Key, Quality, Timing, name_of_recipe
from compress.native import has_native_form
from compress.perturbation import Perturbation, perturb_head, perturb_layer
from compress.product_errors import ErrorMeter
from compress.quantize import Options, make_treat
from compress.reading import RunnerReference, read
from compress.reference import Reference
from compress.runners import open_streams
from compress.scores import FIGURES, measure
from compress.search_options import SearchOptions
from proto.manifest import Recipe
from serve.machine import processor
from serve.native import digest, instruction_set, library

PIECE = 256  # tokens of a window that gradients are taken of
ROUNDING = Options(kv="fp32")  # the native form, which search is about, has a cache of its own


class Subject:
    """Measured once: what is known lies in a file, and is written there as soon as it is."""

    def __init__(self, source: Path, path: Path, options: SearchOptions, threads: int) -> None:
        """Raises CheckpointError, NativeUnavailable, or ValueError for text or a file that will not do."""
        self.source, self.path, self.options, self.threads = source, path, options, threads
        self.checkpoint = Checkpoint(source)
        self.decoder = describe(self.checkpoint)
        self.precisions = native_precisions()
        self.decoder.check_window(options.window)
        if not has_native_form(self.decoder, Recipe(name="", default=self.precisions[0])):
            raise ValueError(
                f"{source} has no native form, which search measures: its activation is {self.decoder.activation!r}. "
                "Choose a recipe by hand"
            )
        self.operators = f"{digest()} {instruction_set(library())}"
        for_calibration, for_validation = sides_of_search(options.text)
        with tempfile.TemporaryDirectory(prefix="pawl-search-") as temporary:
            tokenizer = copy_tokenizer(source, Path(temporary))
        window, counts = options.window, (options.calibration_windows, options.validation_windows)
        self.calibration = make_corpus(for_calibration, tokenizer, "calibration", num_windows=counts[0], window=window)
        self.validation = make_corpus(for_validation, tokenizer, "validation", num_windows=counts[1], window=window)
        self._known = measurements.read(path, self.precisions, self._key_of_quality(), self._key_of_timing())

    @cached_property
    def candidates(self) -> Candidates:
        """Measures what the file does not tell."""
        quality = self._quality()
        if self._known.timing is None:
            with tqdm(total=len(self.precisions), desc="profile", unit="precision", disable=None) as bar:
                timing = speeds.measure(
                    self.checkpoint, self.decoder, self.precisions, threads=self.threads, progress=bar.update
                )
            self._known.timing = Timing(self._key_of_timing(), timing)
            self._known.write(self.path)
        return measurements.tables(self.decoder, self.precisions, quality.kl, self._known.timing.speeds)

    def judge(self, recipe: Recipe) -> Judged:
        """Build the recipe as `quantize` does, in a temporary folder, and judge the native form by the validation."""
        judged = self._quality().judged
        key = name_of_recipe(recipe, self.decoder)
        if key not in judged:
            judged[key] = self._judge(recipe)
            self._known.write(self.path)
        return judged[key]

    def _judge(self, recipe: Recipe) -> Judged:
        with tempfile.TemporaryDirectory(prefix="pawl-search-") as temporary:
            directory, window, threads = Path(temporary), self.options.window, self.threads
            meter = ErrorMeter(recipe)
            treat = make_treat(self.checkpoint, self.decoder, recipe, self.calibration, meter, ROUNDING, threads)
            architecture = build(self.checkpoint, directory, recipe, treat=treat, max_context=window)
            streams = open_streams(directory, "native", architecture, streams=1, capacity=window, threads=threads)
            windows = self.validation.windows
            native = RunnerReference(streams.runner, windows)
            with tqdm(total=len(windows), desc="judge", unit="window", disable=None) as bar:
                exact, scores = read(self._reference, {"native": native}, windows, bar.update)
        found = measure(exact, scores["native"], FIGURES)
        return Judged(found.metrics, found.intervals)

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.checkpoint, self.decoder, self.validation.windows, threads=self.threads)

    def _quality(self) -> Quality:
        if self._known.quality is None:
            self._known.quality = Quality(self._key_of_quality(), self._measure_kl())
            self._known.write(self.path)
        return self._known.quality

    def _measure_kl(self) -> dict[str, list[float]]:
        """Of every product by every precision that it can have."""
        walk = Calibration(self.checkpoint, self.decoder, self.calibration.windows, threads=self.threads)
        found: dict[str, list[Perturbation]] = {}
        for layer in tqdm(range(self.decoder.num_layers), desc="round", unit="layer", disable=None):
            found |= perturb_layer(self.checkpoint, self.decoder, layer, walk.next_layer(), self.precisions)
        of_head = [p for p in self.precisions if offered(self.decoder, "head", p)]
        found["head"] = perturb_head(self.checkpoint, self.decoder, walk.head_moment(), of_head)
        pieces = cut(self.validation.windows)
        with tqdm(total=len(pieces), desc="sensitivity", unit="piece", disable=None) as bar:
            return sensitivity.measure(
                self.source, self.decoder, found, pieces, threads=self.threads, progress=bar.update
            )

    def _key_of_quality(self) -> Key:
        return {
            "checkpoint": self.checkpoint.digest,
            "calibration": self.calibration.digest,
            "validation": self.validation.digest,
            "window": self.options.window,
            "calibration_windows": self.options.calibration_windows,
            "validation_windows": self.options.validation_windows,
        }

    def _key_of_timing(self) -> Key:
        return {
            "checkpoint": self.checkpoint.digest,
            "processor": processor(),
            "operators": self.operators,
            "threads": self.threads,
        }


def cut(windows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Pieces of equal length, PIECE or, if the windows are shorter, a window."""
    return [
        window[start : start + PIECE]
        for window in windows
        for start in range(0, max(len(window) - PIECE, 0) + 1, PIECE)
    ]
