"""Decode and prefill on a GPU: ours beside transformers' generate with a static cache, compiled, on the same model.

Ours is a bare loop over the runner, each run behind the device's guess of the one before, as in the engine; theirs is
`generate`, of which decode is the time of many tokens less that of one. `bandwidth_share` is what a decode step must
read (all weights once, every row's keys and values) over its time and the maker's bandwidth; `peak_share` the forward
pass's arithmetic over its time and the maker's peak. They are null on a device that train/hardware.py does not list.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from bench.machine import describe
from proto.manifest import GRAPH, WEIGHTS, Manifest, load
from serve.device_runner import DeviceRunner
from serve.device_session import devices_of, open_device_session
from serve.device_stream import Device
from serve.plan import Output, Plan
from train.flops import flops_per_token
from train.hardware import HARDWARE, Hardware
from train.peak import listed_as

BATCHES = (1, 8, 64, 256)
WARM_UP = 3
Figures = dict[str, float]


def ours(manifest: Manifest, directory: Path, device: Device, batch: int, prompt: int, tokens: int) -> Figures:
    """Tokens a second of `batch` rows: decoding, and in prompts of `prompt` tokens."""
    session = open_device_session(directory / GRAPH, device)
    sizes = {"num_slots": batch, "capacity": prompt + tokens + WARM_UP, "max_rows": prompt}
    runner = DeviceRunner(session, manifest.architecture, **sizes, stream=session.stream)
    random = np.random.default_rng(0)
    texts = random.integers(manifest.architecture.vocab_size, size=(batch, prompt)).tolist()
    prefill = []
    for _ in range(2):  # the first one allocates
        started = time.perf_counter()
        for slot, text in enumerate(texts):
            plan = Plan()
            plan.add([slot], 0, text)
            runner.run(plan)
        prefill.append(time.perf_counter() - started)
    begun: list[Callable[[], Output]] = []
    landed: list[float] = []
    follows: Sequence[int | None] = [None] * batch
    for past in range(prompt, prompt + tokens + WARM_UP):
        plan = Plan()
        for slot in range(batch):
            plan.add([slot], past, [1], follows=follows[slot])
        begun.append(runner.launch(plan))
        follows = plan.wanted
        if len(begun) > 1:  # as the engine does: a run is read while the next one computes
            begun.pop(0)()
            landed.append(time.perf_counter())
    begun.pop()()
    seconds = np.diff(landed)
    return {"decode": batch / statistics.median(seconds[WARM_UP - 1 :]), "prefill": batch * prompt / prefill[1]}


def theirs(checkpoint: Path, device: Device, batch: int, prompt: int, tokens: int, *, compiled: bool) -> Figures:
    place = torch.device(device.kind, device.number) if device.kind == "cuda" else torch.device("cpu")
    dtype = torch.float16 if device.kind == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = model.to(place).eval()
    if compiled:
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=place)
    fixed = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0}

    def generate(count: int) -> float:
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **fixed)
        if device.kind == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - started

    times: dict[int, float] = {}
    for count in (1, tokens):
        for _ in range(WARM_UP):
            times[count] = generate(count)
    return {"decode": batch * (tokens - 1) / (times[tokens] - times[1]), "prefill": batch * prompt / times[1]}


def shares(manifest: Manifest, per_token: float, batch: int, context: float, rate: float, listed: Hardware) -> Figures:
    """Of the device's limits, at `rate` tokens a second."""
    read = manifest.files[WEIGHTS].size_bytes + batch * context * manifest.kv_bytes_per_token
    return {
        "bandwidth_share": read * rate / batch / listed.bandwidth,
        "peak_share": per_token * rate / listed.peak_flops,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each system and batch, transformers' before ours."""
    manifest, device = load(args.model), devices_of(args.device)[0]
    config = AutoModelForCausalLM.from_pretrained(args.checkpoint).config
    name = torch.cuda.get_device_name(device.number) if device.kind == "cuda" else ""
    listed = HARDWARE.get(listed_as(name) or "")
    context = args.prompt + args.tokens / 2
    per_token = flops_per_token(config, int(context)) / 3  # a training step is three forward passes
    rows = []
    for batch in tqdm(args.batches, desc="bench", unit="batch", disable=None):
        asked = device, batch, args.prompt, args.tokens
        for system in ("transformers", "pawl"):
            is_theirs = system == "transformers"
            found = (
                theirs(args.checkpoint, *asked, compiled=args.compile)
                if is_theirs
                else ours(manifest, args.model, *asked)
            )
            limits = shares(manifest, per_token, batch, context, found["decode"], listed) if listed else {}
            rows.append({"system": system, "batch": batch, **found, **limits})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Time decode and prefill on a GPU.")
    parser.add_argument("--model", type=Path, required=True, help="artifact for CUDA")
    parser.add_argument("--checkpoint", type=Path, required=True, help="that it was made of")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="(default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="transformers' model")
    parser.add_argument("--out", type=Path, help="JSON file to write as well")
    args = parser.parse_args()
    rows = measure(args)
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    asked = {name: getattr(args, name) for name in ("prompt", "tokens", "compile")}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    found = json.dumps({"machine": describe() | {"gpu": gpu} | versions, "asked": asked, "results": rows})
    if args.out:
        args.out.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
