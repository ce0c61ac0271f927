"""From nothing to a served model in about five minutes: `make pretrain-demo`.

Each part is the command that a user would give, printed before it runs: the data set, the tokenizer, a small Llama
with random weights, training, the judgement by held-out modules, quantization with its gate, and the server, which
is judged by the same file and asked to go on with a few lines of Python.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PROMPTS = ("def __init__(self", "import os\nimport ", "    if not isinstance(")


def call(*words: str | Path) -> None:
    arguments = [str(word) for word in words]
    print("\n$ python -m " + shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench.pretrain_demo", description=__doc__)
    top.add_argument("-o", "--output", type=Path, default=Path("models/demo"), help="(default: %(default)s)")
    top.add_argument("--steps", type=int, default=80, help="optimizer steps (default: %(default)s)")
    top.add_argument("--limit", type=int, default=12, help="held-out documents to judge by (default: %(default)s)")
    return top


def pretrain(output: Path, steps: int) -> None:
    """What is there already is not made again, and a run that was ended goes on."""
    data, tokenizer, start = output / "data", output / "tokenizer", output / "start"
    if not data.exists():
        call("train", "dataset", "python-stdlib", "-o", data)
    if not tokenizer.exists():
        call("train", "tokenizer", data / "pretrain.jsonl", "-o", tokenizer, "--vocab-size", "4096")
    if not start.exists():
        call("train", "init", "-o", start, "--tokenizer", tokenizer, "--depth", "5", "--context", "512")
    if not (output / "run" / "model").exists():
        call(
            *("train", "run", start, "--data", data / "pretrain.jsonl", "--held-out", data / "pretrain.held-out.jsonl"),
            *("--output", output / "run", "--steps", str(steps), "--batch", "8", "--learning-rate", "0.003"),
            *("--schedule", "wsd", "--optimizer", "muon", "--eval-rows", "32"),
        )
    if not (output / "w8a8").exists():
        call("compress", "quantize", output / "run" / "model", "-o", output / "w8a8")


def complete(url: str, prompt: str) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 48, "temperature": 0.7, "seed": 1}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text


def main() -> int:
    args = parser().parse_args()
    started = time.monotonic()
    pretrain(args.output, args.steps)
    held_out = args.output / "data" / "pretrain.held-out.jsonl"
    judging = (held_out, "--task", "perplexity", "--limit", str(args.limit))
    call("train", "eval", args.output / "run" / "model", *judging, "-o", args.output / "checkpoint.json")

    serving = [sys.executable, "-m", "serve", "--model", str(args.output / "w8a8")]
    serving += ["--http-port", "0", "--grpc-port", "0", "--records", str(args.output / "records.sqlite")]
    print("\n$ python -m " + shlex.join(serving[2:]), flush=True)
    with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            line = server.stdout.readline()
            print(line, end="")
            found = re.search(r"http://\S+?:\d+", line)
            if not found:
                raise SystemExit("the server did not start")
            call("train", "eval", found[0], *judging, "-o", args.output / "served.json")
            for prompt in PROMPTS:
                print(f"\n{prompt}\x1b[1m{complete(found[0], prompt)}\x1b[0m")
        finally:
            server.terminate()
            server.stdout.read()
    print(
        f"\n{time.monotonic() - started:.0f} s; the model is {args.output / 'run' / 'model'}, served from "
        f"{args.output / 'w8a8'}; the loss is drawn in {args.output / 'run' / 'curves.png'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
