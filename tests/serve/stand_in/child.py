"""Runs artifacts on the CUDA provider over the stand-in; prints what it asked of CUDA in a decode step, as JSON."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from proto.manifest import GRAPH, Architecture
from serve.device_memory import free_bytes
from serve.device_runner import DeviceRunner
from serve.device_session import PROVIDER, open_device_session
from serve.device_stream import Device
from serve.plan import Copy, Plan

SLOTS = 5


def decode(runner: DeviceRunner, past: int, log: Path) -> None:
    plan = Plan()
    plan.add([3], 20 + past, [1], temperature=0.5)
    plan.add([1], 7 + past, [2], follows=1 if past else None)
    results = runner.launch(plan)
    with log.open("a") as lines:
        lines.write("go on 0\n")
    results()


def main() -> None:
    log, device = Path(os.environ["STAND_IN_LOG"]), Device("cuda")
    assert free_bytes(device) == 8 << 30
    found = {}
    for folder in map(Path, sys.argv[1:]):
        architecture = msgspec.json.decode((folder / "architecture.json").read_bytes(), type=Architecture)
        session = open_device_session(folder / GRAPH, device)
        assert session.get_providers()[0] == PROVIDER
        log.write_text("")
        runner = DeviceRunner(session, architecture, num_slots=SLOTS, capacity=64, max_rows=32, stream=session.stream)
        with ThreadPoolExecutor(1) as engine:  # a thread of its own, as an engine has: captured runs belong to it
            found[folder.name] = engine.submit(drive, runner, log).result()
    print(json.dumps(found))


def drive(runner: DeviceRunner, log: Path) -> dict[str, list[str]]:
    """What was asked for in making and preparing the runner, and in a decode step."""
    runner.prepare()
    made = log.read_text().splitlines()
    plan = Plan()
    plan.add([3], 0, list(range(20)), want="all")
    plan.add([1], 0, list(range(7)))
    runner.run(plan)
    decode(runner, 0, log)  # exchanges rows
    log.write_text("")
    decode(runner, 1, log)
    step = log.read_text().splitlines()
    plan = Plan()
    plan.copies.append(Copy(3, 4, 10))
    plan.add([4], 10, [1])
    runner.run(plan)
    return {"made": made, "step": step}


if __name__ == "__main__":
    main()
