"""`python -m train plan`: what a run will need, before anything is bought or started."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.data import find_sources, read
from train.errors import TrainError
from train.flags import add_flags, from_flags, option
from train.flops import CHINCHILLA, Dimensions, dimensions, flops_per_token, parameters
from train.hardware import GIB, HARDWARE, Hardware
from train.tables import aligned

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES_PER_TOKEN = 4.0  # of English with a common tokenizer, where there is none to measure with
RECORDS_MEASURED = 1000
USABLE = 0.9  # of the memory: the rest goes to the driver, to passing results and to fragmentation
ADAMW_TRAFFIC = 28  # bytes a parameter: two states and the weight read and written, the gradient read, in float32


def quantity(text: str) -> float:
    """`1.1B`, `350M`, `2e9`: a positive number. Raises ArgumentTypeError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        value = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no quantity; give a number such as 350M, 1.1B or 2e9") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive quantity; give one such as 350M")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    model: str = option("", "checkpoint to train")
    parameters: float = option(0.0, "or a model of about so many, in the shape of train init", parse=quantity)
    vocabulary: int = option(32768, "tokens of that model's tokenizer", least=256)
    tokens: float = option(0.0, "tokens to train on; left out: 20 a parameter, Chinchilla's", parse=quantity)
    data: tuple[Path, ...] = option((), "or files and folders to train on, whose tokens are estimated")
    epochs: float = option(1.0, "passes over --data", least=0.001)
    context: int = option(2048, "tokens in a row", least=2)
    micro_batch: int = option(8, "rows computed at once on a device", least=1)
    lora_rank: int = option(16, "of the adapters of LoRA and QLoRA", least=1)
    hardware: str = option("h100", "devices to train on", choices=tuple(HARDWARE))
    count: int = option(1, "how many of them", least=1)
    mfu: float = option(0.0, "share of the peak that is reached; 0: what is usual on the hardware", least=0, most=1)
    peak_tflops: float = option(0.0, "peak of a device in TFLOP/s; 0: as listed", least=0)
    memory_gib: float = option(0.0, "memory of a device in GiB; 0: as listed", least=0)
    price: float = option(-1.0, "dollars an hour for a device; -1: as listed", least=-1)
    json: bool = option(False, "print one JSON document")

    def __post_init__(self) -> None:
        """Raises TrainError for flags that contradict each other."""
        if bool(self.model) == bool(self.parameters):
            raise TrainError("give either --model CHECKPOINT or --parameters NUMBER, such as 1.1B")
        if self.tokens and self.data:
            raise TrainError("give either --tokens or --data; --data estimates the tokens")


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, Options)


def run(args: argparse.Namespace) -> int:
    options = from_flags(Options, args)
    plan = make_plan(options)
    print(json.dumps(plan, indent=2) if options.json else as_text(plan))
    return 0


def make_plan(options: Options) -> dict[str, Any]:
    """Everything that is printed, in plain units: bytes, FLOPs, hours, dollars. Raises TrainError."""
    from train.memory import FLOAT32, OPTIMIZER_STATES, layouts, logits

    shape = read_dimensions(Path(options.model)) if options.model else guess(options.parameters, options.vocabulary)
    counts = parameters(shape)
    tokens, source = count_tokens(options, counts.total)
    device = resolve(options)
    per_token = flops_per_token(shape, options.context)
    hours = tokens * per_token / (device.peak_flops * device.mfu) / 3600  # on one device
    at_once = options.micro_batch * options.context
    rows = []
    for layout in layouts(shape, tokens=at_once, devices=options.count, lora_rank=options.lora_rank):
        each = hours * layout.arithmetic / layout.devices
        rows.append(
            {
                **asdict(layout),
                "total": layout.total,
                "fits": layout.total <= USABLE * device.memory,
                "hours": each,
                "dollars": each * layout.devices * device.price,
            }
        )
    return {
        "model": {**asdict(shape), "parameters": asdict(counts)},
        "tokens": tokens,
        "tokens_from": source,
        "tokens_per_parameter": tokens / counts.total,
        "chinchilla_tokens": CHINCHILLA * counts.total,
        "context": options.context,
        "flops_per_token": per_token,
        "flops": tokens * per_token,
        "hardware": {"name": options.hardware, "count": options.count, **asdict(device)},
        "micro_batch": options.micro_batch,
        "micro_batch_seconds": at_once * per_token / (device.peak_flops * device.mfu),
        "optimizer_seconds": ADAMW_TRAFFIC * counts.total / device.bandwidth,
        "layouts": rows,
        "logits_whole_bytes": logits(shape, at_once, chunked=False),
        "checkpoint_bytes": FLOAT32 * counts.total,
        "resume_bytes": (FLOAT32 + OPTIMIZER_STATES["adamw"]) * counts.total,
    }


def read_dimensions(checkpoint: Path) -> Dimensions:
    from transformers import AutoConfig

    if not (checkpoint / "config.json").is_file():
        raise TrainError(f"--model {checkpoint} has no config.json; give a Hugging Face directory")
    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    except (ValueError, OSError) as error:
        raise TrainError(f"--model {checkpoint} cannot be read: {error}") from error
    return dimensions(config)


def guess(wanted: float, vocabulary: int) -> Dimensions:
    """The shape that `train init` would give to about `wanted` parameters: its width for a depth, or near it.

    Raises TrainError if even the smallest has many more.
    """
    from train.fresh import WIDTH_PER_LAYER, FreshOptions

    def of(depth: int, width: int) -> Dimensions:
        made = FreshOptions(depth=depth, width=width)
        return Dimensions(
            family="llama",
            layers=depth,
            width=made.hidden_size,
            heads=made.num_heads,
            kv_heads=made.num_kv_heads,
            head_size=made.head_size,
            inner=made.intermediate_size,
            vocabulary=vocabulary,
            tied=made.ties,
        )

    depth = 1
    while parameters(of(depth, 0)).total < wanted:
        depth += 1
    near = [
        of(layers, width * WIDTH_PER_LAYER)
        for layers in (depth - 1, depth)
        for width in range(layers * 3 // 4, layers * 5 // 4 + 1)
        if layers and width
    ]
    best = min(near, key=lambda shape: abs(parameters(shape).total - wanted))
    found = parameters(best).total
    if abs(found - wanted) > 0.2 * wanted:
        raise TrainError(
            f"--parameters {wanted:g}: with --vocabulary {vocabulary} the nearest model has {found:,}; "
            "give more parameters, or a smaller vocabulary"
        )
    return best


def resolve(options: Options) -> Hardware:
    """As listed, but for what the flags say."""
    listed = HARDWARE[options.hardware]
    return Hardware(
        peak_flops=options.peak_tflops * 1e12 or listed.peak_flops,
        memory=options.memory_gib * GIB or listed.memory,
        bandwidth=listed.bandwidth,
        price=listed.price if options.price < 0 else options.price,
        mfu=options.mfu or listed.mfu,
    )


def count_tokens(options: Options, num_parameters: int) -> tuple[float, str]:
    """Tokens to train on, and where the number is from."""
    if options.tokens:
        return options.tokens, "as given"
    if not options.data:
        return float(CHINCHILLA * num_parameters), f"{CHINCHILLA} a parameter"
    from train.content import text_of

    size = 0
    sample: list[str] = []
    total = sum(source.num_bytes for path in options.data for source in find_sources(path))
    with tqdm(total=total, desc="count", unit="B", unit_scale=True, disable=None) as bar:
        for record in read(options.data, progress=bar.update):
            text = text_of(record.columns)
            size += len(text.encode())
            if len(sample) < RECORDS_MEASURED:
                sample.append(text)
    if not size:
        raise TrainError(f"--data {options.data[0]} has no text that can be counted; give --tokens")
    per_token, how = BYTES_PER_TOKEN, f"{BYTES_PER_TOKEN:g} bytes a token assumed"
    tokenizer = Path(options.model) / "tokenizer.json"
    if options.model and tokenizer.is_file():
        from tokenizers import Tokenizer

        encoded = Tokenizer.from_file(str(tokenizer)).encode_batch(sample)
        per_token = len("".join(sample).encode()) / max(1, sum(len(item.ids) for item in encoded))
        how = f"{per_token:.2f} bytes a token measured"
    return options.epochs * size / per_token, f"{options.epochs:g} x {size:,} bytes, {how}"


def as_text(plan: dict[str, Any]) -> str:
    model, counts, device = plan["model"], plan["model"]["parameters"], plan["hardware"]
    billions = [f"{plan[key] / 1e9:,.4g}" for key in ("tokens", "chinchilla_tokens")]
    lines = [
        f"model       {model['family']}, {model['layers']} layers of width {model['width']}",
        f"parameters  {counts['total']:,}, {counts['embedding']:,} of them embeddings",
        f"tokens      {billions[0]} billion ({plan['tokens_from']}), {plan['tokens_per_parameter']:.3g} a parameter; "
        f"Chinchilla's {CHINCHILLA} are {billions[1]} billion",
        f"arithmetic  {plan['flops']:.3g} FLOPs, {plan['flops_per_token']:.3g} a token at context {plan['context']}",
        f"hardware    {device['count']} x {device['name']}: {device['peak_flops'] / 1e12:,.4g} TFLOP/s at "
        f"{device['mfu']:.0%} MFU, {gib(device['memory'])} GiB of which {USABLE:.0%} are used, "
        f"{device['price']:.2f} dollars an hour",
        f"a step      {plan['micro_batch_seconds']:.3g} s for a micro-batch of {plan['micro_batch']} rows, and "
        f"{plan['optimizer_seconds']:.3g} s for AdamW's memory traffic",
        f"on disk     {plan['checkpoint_bytes'] / 1e9:,.3g} GB a checkpoint, "
        f"{plan['resume_bytes'] / 1e9:,.3g} GB to resume from (AdamW)",
        "",
        "GiB on each device:",
    ]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    rows = [
        [
            row["name"] + (", recomputed" if row["recomputed"] else ""),
            str(row["devices"]),
            *(gib(row[part]) for part in parts),
            "yes" if row["fits"] else "no",
            f"{row['hours']:,.3g}",
            f"{row['dollars']:,.2f}",
        ]
        for row in plan["layouts"]
    ]
    table = aligned(("layout", "devices", *parts, "fits", "hours", "dollars"), rows)
    return "\n".join([*lines, table, "", f"Logits that are not made in chunks: {gib(plan['logits_whole_bytes'])} GiB."])


def gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"
