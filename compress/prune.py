"""From a checkpoint to a smaller one: what matters least goes, and what the budget leaves is chosen by trial.

The result is a plain Hugging Face model, to be distilled from the whole one by `python -m train run`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoConfig

from compress.artifact_folder import artifact_folder
from compress.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint
from compress.corpus import make_corpus, sides_of
from compress.families import Decoder, describe
from compress.importance import measure
from compress.pruned import Kept, PrunedCheckpoint, has_free_width
from compress.reading import read
from compress.reference import Reference
from compress.scores import KL, NLL, Table, shorten
from compress.shapes import PruneOptions, Size, bytes_per_token, candidates, total_parameters
from serve.tokenizer import Tokenizer
from train.export import add_companions
from train.flops import Dimensions, dimensions
from train.folders import refuse_existing

SHARD = 2 << 30  # bytes of a weight file, and so of memory for writing it
JUDGES = 4  # calibration windows by which the shapes are told apart


def prune(source: Path, target: Path, size: Size, options: PruneOptions, *, threads: int) -> dict[str, Any]:
    """Make the checkpoint `target` from the checkpoint `source`, and return what its training.json says.

    Raises CheckpointError or ValueError for bad input, TrainError if `target` is there.
    """
    refuse_existing(target)
    whole = Checkpoint(source)
    decoder = describe(whole)
    decoder.check_window(options.window)
    full = dimensions(AutoConfig.from_pretrained(source, local_files_only=True))
    shapes = candidates(full, size, free_width=has_free_width(decoder.family))
    for_calibration, for_judging = sides_of(options.text)
    tokenizer = Tokenizer(source)
    window = options.window
    text = make_corpus(
        for_calibration, tokenizer, "calibration", num_windows=options.calibration_windows, window=window
    )
    held_out = make_corpus(for_judging, tokenizer, "held-out", num_windows=options.held_out_windows, window=window)
    importance = measure(whole, decoder, text.windows, threads=threads)
    shape = choose(whole, decoder, [(shape, importance.kept(shape)) for shape in shapes], text.windows, threads)
    kept = importance.kept(shape)
    small = PrunedCheckpoint(whole, decoder, kept)
    expected = Reference(whole, decoder, held_out.windows, threads=threads)
    found = Reference(small, describe(small), held_out.windows, threads=threads)
    exact, scores = read(expected, {"pruned": found}, held_out.windows)
    (before, _), (perplexity, kl) = means(exact), means(scores["pruned"])
    training = {
        "objective": "prune",
        "parent": whole.digest,
        "data": {"calibration": text.digest, "held_out": held_out.digest},
        "shape": asdict(shape),
        "layers": kept.layers,
        "metrics": {
            "parameters": total_parameters(shape),
            "parameters_before": total_parameters(full),
            "bytes_per_token": bytes_per_token(shape),
            "bytes_per_token_before": bytes_per_token(full),
            "perplexity": shorten(perplexity),
            "perplexity_before": shorten(before),
            "kl": shorten(kl),
        },
    }
    with artifact_folder(target) as folder:
        write(small, folder)
        add_companions(folder, source, training)
    return training


def pruned_to(target: Path, training: dict[str, Any]) -> str:
    """What became of the model, for people."""
    shape, now = training["shape"], training["metrics"]
    return (
        f"{target} has {now['parameters']:,} parameters of {now['parameters_before']:,}: {shape['layers']} layers, "
        f"hidden width {shape['width']}, {shape['kv_heads']} KV heads, MLP width {shape['inner']}; a decoded token "
        f"reads {now['bytes_per_token'] / now['bytes_per_token_before']:.0%} of the bytes. Perplexity is "
        f"{now['perplexity']:g}, was {now['perplexity_before']:g}: distil from the whole one with `python -m train run`"
    )


def choose(
    whole: Checkpoint,
    decoder: Decoder,
    cuts: Sequence[tuple[Dimensions, Kept]],
    windows: Sequence[Sequence[int]],
    threads: int,
) -> Dimensions:
    """The shape with the least KL(whole || pruned)."""
    if len(cuts) == 1:
        return cuts[0][0]
    windows = windows[:JUDGES]
    expected = Reference(whole, decoder, windows, threads=threads)
    losses = []
    for _, kept in tqdm(cuts, desc="shapes", unit="shape", disable=None):
        small = PrunedCheckpoint(whole, decoder, kept)
        losses.append(compare(expected, Reference(small, describe(small), windows, threads=threads), windows)[1])
    return cuts[int(np.argmin(losses))][0]


def compare(expected: Reference, found: Reference, windows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The perplexity of `found`, and KL(expected || found) a token."""
    _, scores = read(expected, {"found": found}, windows)
    return means(scores["found"])


def means(tables: Sequence[Table]) -> tuple[float, float]:
    """Perplexity, and KL a token, of the scores of all windows."""
    found = np.concatenate(tables).mean(axis=0)
    return float(np.exp(found[NLL])), float(found[KL])


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json and the weights, in files of at most `SHARD` bytes or a tensor, in the types that they had."""
    (folder / CONFIG).write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
    shards: list[dict[str, int]] = []  # tensor -> bytes
    held: dict[str, Any] = {}

    def flush() -> None:
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        held.clear()

    for name in tqdm(sorted(checkpoint.names), desc="write", unit="tensor", disable=None):
        tensor = checkpoint.read(name).astype(checkpoint.dtype(name), copy=False)
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > SHARD:
            flush()
        held[name] = tensor
    flush()
    if len(shards) == 1:
        (folder / "1.safetensors").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
