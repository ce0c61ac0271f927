"""`python -m bench.device_share`: how much of a device's time the server uses, with many clients reading streams.

On a GPU (`--device cuda`) what `nvidia-smi` says of it while the clients run. Without one, a device that takes a fixed
time for every run (bench/simulated_device.py), once with runs that go ahead and once with runs that wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from bench.load import run_load
from bench.machine import describe
from bench.row import Load
from bench.server import Server
from proto.manifest import load as load_manifest

STEPS_MS = (1.2, 3.0, 6.0)
QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
SAMPLE_MS = 200


class Utilization:
    """Per cent of the time in which a GPU computed, read off while this is entered."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.samples: list[float] = []

    def __enter__(self) -> Self:
        command = [*QUERY, f"--id={self._number}", f"--loop-ms={SAMPLE_MS}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        lines = self._process.communicate()[0].split()
        self.samples = [float(line) for line in lines]

    @property
    def busy(self) -> float:
        """The median, from 0 to 1: of a run that begins and ends idle."""
        return statistics.median(self.samples) / 100


def arguments(model: Path, port: int, load: Load, scratch: Path, *more: str) -> list[str]:
    """Of `python -m serve`, with a slot for each client."""
    context = load.input_len + load.output_len
    options = {
        "model": model,
        "http-port": port,
        "grpc-port": 0,
        "slots": load.concurrency,
        "max-context": context,
        "max-queue": 2 * load.concurrency,
        "records": scratch / "records.sqlite",
    }
    return [*(str(part) for name, value in options.items() for part in (f"--{name}", value)), *more]


def drive(server: Server, load: Load) -> dict[str, Any]:
    """The clients' figures of two requests each."""
    return run_load(server.port, server.model, load, num_requests=2 * load.concurrency, seed=0)


def simulated(model: Path, load: Load, step_ms: float, how: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "device.json")

        def command(port: int, scratch: Path) -> list[str]:
            module = [sys.executable, "-m", "bench.simulated_device", str(path), str(step_ms), how]
            return [*module, *arguments(model, port, load, scratch, "--kv-budget-mib", "64")]

        with Server("pawl", command) as server:
            figures = drive(server, load)
        return {"device": "simulated", "step_ms": step_ms, "runs": how, **json.loads(path.read_text()), **figures}


def on_gpu(model: Path, load: Load, device: str) -> dict[str, Any]:
    _, _, number = device.partition(":")

    def command(port: int, scratch: Path) -> list[str]:
        return [sys.executable, "-m", "serve", *arguments(model, port, load, scratch, "--device", device)]

    with Server("pawl", command) as server, Utilization(int(number or 0)) as utilization:
        figures = drive(server, load)
    return {"device": device, "busy": utilization.busy, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.device_share", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="artifact; one for CUDA if on a GPU")
    parser.add_argument("--device", default="simulated", help="cuda, cuda:1 or simulated (default: %(default)s)")
    parser.add_argument("--steps-ms", type=float, nargs="+", default=STEPS_MS, help="simulated (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="streams at a time (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=16, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=1000, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write as well")
    args = parser.parse_args()
    load_manifest(args.model)
    load = Load(args.input_len, args.output_len, args.concurrency)
    if args.device == "simulated":
        asked = [(step, how) for step in args.steps_ms for how in ("waits", "ahead")]
        turns = tqdm(asked, desc="bench", unit="server", disable=None)
        rows = [simulated(args.model, load, step, how) for step, how in turns]
    else:
        rows = [on_gpu(args.model, load, args.device)]
    for row in rows:
        what = f"{row['step_ms']:g} ms a step, {row['runs']}" if "step_ms" in row else row["device"]
        print(f"{what}: busy {row['busy']:.0%}, {row['output_throughput']:.0f} tokens/s")
    found = json.dumps({"machine": describe(), "load": {"concurrency": args.concurrency}, "results": rows})
    if args.out:
        args.out.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
