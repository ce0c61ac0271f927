"""`python -m train run`: everything that a run is made of, put together; then the loop; then the export."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from train.adapters import LoraOptions, attach, merge
from train.batches import open_batches
from train.checkpoints import CheckpointOptions, Checkpoints
from train.distillation import DistillOptions
from train.distributed import World, joined
from train.errors import TrainError
from train.export import digest, export
from train.flags import add_flags, from_flags
from train.flops import flops_per_token
from train.guard import Guard, GuardOptions
from train.loop import Training, train
from train.model import Model, load_model
from train.objectives import OBJECTIVES, make_objective
from train.optimizers import OptimizerOptions, make_optimizers
from train.options import Options
from train.peak import peak_of
from train.plot import draw
from train.preferences import DpoOptions, KtoOptions
from train.run_folder import RunFolder, environment
from train.samples import Shape
from train.teacher import load_teacher
from train.token_store import TokenStore, prepare
from train.tracker import Tracker, TrackerOptions, read_metrics

EXIT_ENDED = 143  # as a shell reports SIGTERM: an orchestrator starts the same command again, which goes on
MOST_CONTEXT = 1024
JUDGEMENTS = 10  # in a run
ADAPTER_FACTOR = 10  # adapters want about ten times the learning rate (Schulman et al. 2025)
LEARNING_RATES = {"next-token": 3e-4, "sft": 3e-5, "dpo": 1e-6, "kto": 1e-6, "distill": 1e-4, "classify": 3e-5}
KINDS: dict[type, str] = {  # with the prefix of their flags
    Options: "",
    LoraOptions: "lora_",
    OptimizerOptions: "",
    DpoOptions: "dpo_",
    KtoOptions: "kto_",
    DistillOptions: "distill_",
    GuardOptions: "",
    CheckpointOptions: "",
    TrackerOptions: "",
}


def configure(parser: argparse.ArgumentParser) -> None:
    for kind, prefix in KINDS.items():
        add_flags(parser, kind, prefix)


def run(args: argparse.Namespace) -> int:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    asked: dict[type, Any] = {kind: from_flags(kind, args, prefix) for kind, prefix in KINDS.items()}
    with joined() as world:
        folder = RunFolder(asked[Options].output)
        if folder.finished:
            print(f"{folder.model} is there: this run is done")
            return 0
        if world.leads:
            folder.open(
                {prefix + name: value for kind, prefix in KINDS.items() for name, value in asdict(asked[kind]).items()}
            )
        world.wait()
        training, sources = put_together(asked, folder, world)
        if training.resume():
            world.say(f"resumed after step {training.step} of {training.steps}")
        tracker = Tracker(
            folder.path,
            asked[TrackerOptions],
            steps=training.steps,
            start=training.step,
            settings=json.loads((folder.path / "options.json").read_text()),
            leads=world.leads,
        )
        done = False
        try:
            done = train(training, tracker)
        finally:
            tracker.close(failed=not done)
            if world.leads:
                draw(folder.path)
        if not done:
            world.say(f"ended after step {training.step} of {training.steps}, saved; the same command goes on")
            return EXIT_ENDED
        network = merge(training.model)
        if world.leads:
            export(network, training.options.checkpoint, folder.model, record(training, folder, sources))
            print(f"{folder.model} is a checkpoint: give it to `python -m compress quantize`")
    return 0


def put_together(asked: dict[type, Any], folder: RunFolder, world: World) -> tuple[Training, dict[str, Any]]:
    """Data, model, objective, optimizers and what watches over them; and what the data was made of."""
    options = asked[Options] = settled(asked[Options], world)
    kind = OBJECTIVES[options.objective]
    torch.manual_seed(options.seed)
    store, held_out = tokenized(options, folder, world)
    data = open_batches(store, options.batch, options.seed)
    # As few rows at a time as there can be: what is left over at the end of the data would be judged twice.
    few = world.size * (2 if store.info.shape == Shape.THUMBS else 1)
    judged = open_batches(held_out, few, options.seed) if held_out else None
    steps = options.steps or math.ceil(options.epochs * data.steps_per_epoch)

    def load() -> Model:
        return load_model(
            options.checkpoint,
            dtype=torch.float32,
            classes=len(store.info.labels) if kind.classes else None,
            quantization="nf4" if options.adapter == "qlora" else None,
        )

    model = load()
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    reference = load().requires_grad_(False).eval() if kind.reference and options.adapter == "none" else None
    teacher = None
    if kind.teacher and options.teacher:
        teacher = load_teacher(Path(options.teacher), options.checkpoint, options.teacher_precision)
    if options.adapter != "none":
        attach(model, asked[LoraOptions])
    if options.checkpoint_activations:
        model.checkpoint_activations()
    for each in filter(None, (model, reference, teacher)):
        world.shard(each)
        if options.compile:
            for layer in each.layers:
                layer.compile()
    peak_flops, source = peak_of(world.device, dtype)
    world.say(f"MFU is of {peak_flops / 1e12:.3g} TFLOP/s ({source})")
    training = Training(
        options=options,
        world=world,
        model=model.train(),
        objective=make_objective(
            options.objective, asked[kind.options] if kind.options else None, reference=reference, teacher=teacher
        ),
        data=data,
        held_out=judged,
        optimizers=make_optimizers(model.named_parameters(), options.learning_rate, asked[OptimizerOptions]),
        guard=Guard(asked[GuardOptions]),
        checkpoints=Checkpoints(folder.checkpoints, asked[CheckpointOptions]),
        steps=steps,
        eval_every=options.eval_every or max(1, steps // JUDGEMENTS),
        eval_steps=min(-(-options.eval_rows // few), judged.steps_per_epoch) if judged else 0,
        dtype=dtype,
        # Frozen weights need no gradients: a third of the arithmetic falls away.
        flops_per_token=arithmetic(model, options.context) * (1 if options.adapter == "none" else 2 / 3),
        peak_flops=peak_flops,
    )
    return training, msgspec.to_builtins(store.info)


def arithmetic(model: Model, context: int) -> float:
    """FLOPs of a token; for a family that cannot be counted exactly, 6 for each parameter."""
    try:
        return flops_per_token(model.config, context)
    except TrainError:
        return 6.0 * sum(parameter.numel() for parameter in model.parameters())


def settled(options: Options, world: World) -> Options:
    """With all that was left to us, which is said once. Raises TrainError for options that do not fit together."""
    if options.objective not in OBJECTIVES:
        raise TrainError(f"--objective {options.objective} is unknown; give one of {', '.join(OBJECTIVES)}")
    if not options.data:
        raise TrainError("there is nothing to learn from; give files or folders with --data")
    if options.batch % world.size:
        raise TrainError(f"--batch {options.batch} is not a multiple of the {world.size} processes; give one that is")
    said = []
    most = AutoConfig.from_pretrained(options.checkpoint).max_position_embeddings
    if options.context > most:
        raise TrainError(f"--context {options.context} is over the model's {most}; give at most that")
    if not options.context:
        options = replace(options, context=min(most, MOST_CONTEXT))
        said.append(f"context {options.context} (the model's, at most {MOST_CONTEXT})")
    if not options.learning_rate:
        factor = 1 if options.adapter == "none" else ADAPTER_FACTOR
        options = replace(options, learning_rate=LEARNING_RATES[options.objective] * factor)
        told = "" if factor == 1 else f", {factor} times for adapters"
        said.append(f"learning rate {options.learning_rate:g} (for {options.objective}{told})")
    if options.precision == "auto":
        precision, why = best_precision(world.device)
        options = replace(options, precision=precision)
        said.append(f"{precision} ({why})")
    if said:
        world.say("; ".join(said))
    return options


def best_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        return ("bfloat16", "this GPU has it") if torch.cuda.is_bf16_supported() else ("float32", "an old GPU")
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16") or has.get("avx512_bf16"):
        return "bfloat16", "this processor multiplies it"
    return "float32", "this processor has no bfloat16 products"


def tokenized(options: Options, folder: RunFolder, world: World) -> tuple[TokenStore, TokenStore | None]:
    """The data to learn from, and to judge by. The first process makes them, the others find them made."""
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    cache = Path(options.cache) if options.cache else folder.path / "data"
    shape = Shape(options.shape or OBJECTIVES[options.objective].shapes[0])

    def made(paths: tuple[Path, ...], labels: list[str]) -> TokenStore:
        return prepare(paths, shape, tokenizer, options.context, cache, too_long=options.too_long, labels=labels)

    if not world.leads:
        world.wait()
    store = made(options.data, [])
    held_out = made(options.held_out, store.info.labels) if options.held_out else None
    if world.leads:
        world.wait()
    return store, held_out


def record(training: Training, folder: RunFolder, sources: dict[str, Any]) -> dict[str, Any]:
    """training.json: what was learnt, from what, and from whom."""
    return {
        "objective": training.options.objective,
        "adapter": training.options.adapter,
        "steps": training.step,
        "tokens": training.tokens,
        "rejected_steps": training.guard.rejected,
        "metrics": read_metrics(folder.path)[-1],
        "data": sources,
        "parent": digest(training.options.checkpoint),
        "environment": environment(),
    }
