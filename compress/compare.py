"""Two artifacts side by side: what a reference says of both on the same held-out text, their sizes and their speed.

The reference is a checkpoint in full precision, or, without one, the first artifact. Differences are the second less
the first, with intervals by the paired bootstrap: both read the same windows and continue the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from compress import speed
from compress.checkpoint import Checkpoint
from compress.corpus import make_corpus, sides_of
from compress.families import describe
from compress.gate import Evidence, examine
from compress.quantize import Options
from compress.reading import MakeReference, RunnerReference
from compress.reference import Reference
from compress.runners import forms_here, open_streams
from compress.scores import CANDIDATE, FIGURES, REFERENCE_FIGURES, SEED, WIDTH, Measured, Table, measure, paired_sums
from compress.sizes import Part, parts_of
from proto.manifest import TOKENIZER, Form, Manifest, Serving, load
from serve.tokenizer import Tokenizer
from train.evaluation.intervals import Figure, interval
from train.flags import option

SHARED = Options()


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Settings of `python -m compress compare`."""

    reference: Path | None = option(None, "checkpoint that both are measured against (default: the first)", parse=Path)
    text: Path | None = option(SHARED.text, "text to judge by (default: Python's own docs)", parse=Path)
    window: int = option(SHARED.window, "tokens of context", least=2)
    held_out_windows: int = option(SHARED.held_out_windows, "windows of held-out text", least=2)
    measure: bool = option(SHARED.measure, "time both (default: on)")
    output: Path | None = option(None, "HTML page to write as well", parse=Path)


@dataclass(frozen=True, slots=True)
class Subject:
    """An artifact, in the form that would be served here."""

    name: str
    directory: Path
    manifest: Manifest
    form: Form

    @property
    def title(self) -> str:
        return f"{self.name} ({self.form})"


@dataclass(frozen=True, slots=True)
class Comparison:
    subjects: tuple[Subject, Subject]
    reference: str  # what both are measured against
    evidence: Evidence[str]
    figures: dict[str, Measured]  # by the subject's name
    of_reference: Measured
    difference: Measured  # the second less the first
    parts: dict[str, dict[str, Part]]  # by the subject's name, then by group of tensors
    serving: dict[str, Serving]
    machine: str


def compare(first: Path, second: Path, options: CompareOptions, *, threads: int) -> Comparison:
    """Raises ManifestError, CheckpointError or ValueError for what cannot be compared."""
    a, b = subjects = load_subjects(first, second)
    limit = min(subject.manifest.architecture.max_context for subject in subjects)
    if options.window > limit:
        raise ValueError(f"--window {options.window} is beyond the artifacts' {limit} tokens; give less")
    _, texts = sides_of(options.text)
    held_out = make_corpus(
        texts, Tokenizer(first), "held-out", num_windows=options.held_out_windows, window=options.window
    )
    windows = held_out.windows
    make_reference = reference_of(a, windows, options, threads)
    candidates = {
        subject.name: open_streams(
            subject.directory,
            subject.form,
            subject.manifest.architecture,
            streams=len(windows),
            capacity=options.window,
            threads=threads,
        )
        for subject in subjects
    }
    with tqdm(total=3 * len(windows), desc="compare", unit="text", disable=None) as bar:
        eos = a.manifest.architecture.eos_token_ids
        evidence = examine(make_reference, candidates, windows, eos=eos, progress=bar.update)
    del candidates
    serving = {}
    if options.measure:
        for subject in subjects:
            found = speed.measure(subject.directory, subject.manifest.architecture, subject.form, threads)
            serving[subject.name] = found
    return Comparison(
        subjects=subjects,
        reference="the float32 model" if options.reference else a.title,
        evidence=evidence,
        figures={subject.name: evidence.figures(subject.name) for subject in subjects},
        of_reference=measure(evidence.reference, evidence.reference, REFERENCE_FIGURES),
        difference=differences(evidence, a.name, b.name),
        parts={subject.name: parts_of(subject.directory) for subject in subjects},
        serving=serving,
        machine=speed.machine(threads),
    )


def load_subjects(first: Path, second: Path) -> tuple[Subject, Subject]:
    """Both, verified. Raises ValueError if they are the same, or read different tokens."""
    manifests = load(first), load(second)
    if first.resolve() == second.resolve():
        raise ValueError(f"{first} and {second} are one artifact; give two")
    names = [first.name, second.name] if first.name != second.name else [str(first), str(second)]
    one, other = (manifest.files[TOKENIZER].sha256 for manifest in manifests)
    if one != other:
        raise ValueError(
            f"{first} and {second} have different tokenizers, and figures by token cannot be compared; "
            "give artifacts of one tokenizer"
        )
    a, b = (
        Subject(name, directory, manifest, forms_here(directory)[0])
        for name, directory, manifest in zip(names, (first, second), manifests, strict=True)
    )
    return a, b


def reference_of(
    first: Subject, windows: Sequence[Sequence[int]], options: CompareOptions, threads: int
) -> MakeReference:
    """The checkpoint that is named, streamed; or the first artifact, in a runner of its own."""
    if options.reference:
        checkpoint = Checkpoint(options.reference)
        decoder = describe(checkpoint)
        if decoder.vocab_size != first.manifest.architecture.vocab_size:
            raise ValueError(
                f"--reference {options.reference} has {decoder.vocab_size:,} tokens, and the artifacts "
                f"{first.manifest.architecture.vocab_size:,}; give the checkpoint that they were made from"
            )
        return lambda windows: Reference(checkpoint, decoder, windows, threads=threads)
    architecture = first.manifest.architecture
    capacity = max(map(len, windows))
    streams = open_streams(first.directory, first.form, architecture, streams=1, capacity=capacity, threads=threads)
    return lambda windows: RunnerReference(streams.runner, windows)


def differences(evidence: Evidence[str], first: str, second: str) -> Measured:
    """Every figure of the second less that of the first."""
    rows = paired_sums(evidence.reference, evidence.scores[first], evidence.scores[second])
    swapped = [*range(CANDIDATE), *range(CANDIDATE + WIDTH, CANDIDATE + 2 * WIDTH)]  # the second as the candidate
    found = Measured()
    for name, figure in FIGURES.items():
        change = partial(_change, figure, swapped)
        found.add(name, change(rows.sum(0)), interval(rows.tolist(), change, seed=SEED))
    same, whole = np.array([evidence.identical[name] for name in (first, second)]).transpose(2, 0, 1)  # [2, answers]
    found.add_mean("identical_length", (same[1] - same[0]).tolist())
    found.add("identical_median", float(np.median(same[1]) - np.median(same[0])))
    is_whole = (same == whole).astype(float)
    found.add_mean("identical_share", (is_whole[1] - is_whole[0]).tolist())
    return found


def _change(figure: Figure, swapped: list[int], sums: Table) -> float:
    return figure(sums[swapped]) - figure(sums)


def bytes_by_part(comparison: Comparison) -> dict[str, tuple[int, int]]:
    """Of every group of tensors, in both; and of all together."""
    a, b = (comparison.parts[subject.name] for subject in comparison.subjects)
    sizes = {part: (_bytes(a, part), _bytes(b, part)) for part in dict.fromkeys([*a, *b])}
    return {**sizes, "all": (sum(x for x, _ in sizes.values()), sum(y for _, y in sizes.values()))}


def _bytes(parts: Mapping[str, Part], name: str) -> int:
    return parts[name].size_bytes if name in parts else 0
