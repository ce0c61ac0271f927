"""The whole circle on one machine: `make loop`.

1 a server follows a registry, and people who judge by a rule that the model does not know talk to it; 2 their
corrections become a version, which has to pass the gate; 3 it gets half of the traffic, and is promoted when enough
people liked it better; 4 questions that nobody ever corrected are asked again; 5 a rollback and a return, while people
talk; 6 somebody who has stolen most of the keys "corrects" answers, and the gate refuses what is learnt from that.

Each part is the command that a user would give, printed before it runs. The figures go to OUTPUT/loop.json and
OUTPUT/satisfied.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bench.plot import GREY, OTHERS, OURS, STYLE
from bench.population import (
    Address,
    Person,
    Population,
    Question,
    Reaction,
    Said,
    judge,
    make_keys,
    poison,
    read_questions,
)
from compress.corpus import default_texts

POLICY = Path(__file__).with_name("feedback_loop.toml")
PEOPLE = ("anna", "boris", "chloe", "dmitri", "esra", "femi")
STOLEN = 4  # of their keys
CORRECTED = 120  # of the questions with answers are asked in the first round; the others stay unseen
POISONED = 80
HELD_OUT_TEXTS = 20
TRIAL_QUESTIONS, TRIAL_ROUNDS = 40, 9
EXIT_REFUSED = 3


class Loop:
    """In a folder of its own, with a server that follows its registry."""

    def __init__(self, folder: Path, address: Address, keys: dict[str, str]) -> None:
        self.folder = folder
        self.address = address
        self.keys = keys
        self.questions, self.other = read_questions()
        self.asked, self.unseen = self.questions[:CORRECTED], self.questions[CORRECTED:]
        self.results: dict[str, Any] = {"rounds": [], "seconds": {}}

    @property
    def records(self) -> Path:
        return self.folder / "records.sqlite"

    @property
    def registry(self) -> Path:
        return self.folder / "registry"

    @property
    def held_out(self) -> Path:
        """Some of the texts that `deploy retrain` judges by; all of them would take minutes."""
        path = self.folder / "held_out.jsonl"
        if not path.exists():
            texts = [text[:1500] for text in default_texts()[1][:HELD_OUT_TEXTS]]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    def talk(
        self, questions: Sequence[Question], react: Reaction | None = None, *, keys: int | None = None, seed: int = 0
    ) -> list[Said]:
        """What the server answered to people who have the first `keys` of the keys."""

        async def run() -> list[Said]:
            async with Population(self.address, dict(list(self.keys.items())[:keys]), seed) as people:
                return await people.talk(questions, react)

        return asyncio.run(run())

    def retrain(self, checkpoint: Path) -> int:
        return call(
            *("deploy", "retrain", "--registry", self.registry, "--work", self.folder / "cycles"),
            *("--records", self.records, "--checkpoint", checkpoint, "--policy", POLICY),
            *("--held-out", self.held_out),
            check=(0, EXIT_REFUSED),
        )

    def measure(self, name: str) -> None:
        """How many are satisfied with answers to questions that nobody corrected."""

        unseen, other = self.talk(self.unseen), self.talk(self.other)
        row = {"round": name, **shares("unseen", unseen), **shares("other", other)}
        self.results["rounds"].append(row)
        print(
            f"\n{name}: {row['unseen_satisfied']:.0%} of {len(unseen)} unseen questions were answered as people want "
            f"it, {row['unseen_known']:.0%} rightly; of {len(other)} of another kind {row['other_satisfied']:.0%}",
            flush=True,
        )
        for said in (*unseen[:3], *other[:2]):
            print(f"    {said.question.question}  {said.text!r}")


def shares(name: str, answers: Sequence[Said]) -> dict[str, float]:
    """Raises RuntimeError if a request failed."""
    for said in answers:
        if said.error:
            raise RuntimeError(f"a request failed: {said.error}")
    factual = [said.knows for said in answers if said.question.fact]
    satisfied = [said.satisfies for said in answers]
    return {f"{name}_satisfied": sum(satisfied) / len(satisfied), f"{name}_known": sum(factual) / len(factual)}


def call(*words: str | Path, check: tuple[int, ...] = (0,)) -> int:
    """Run a command of ours; its exit status. Raises SystemExit for one that is not in `check`."""
    arguments = [str(word) for word in words]
    print("\n$ python -m " + shlex.join(arguments), flush=True)
    status = subprocess.run([sys.executable, "-m", *arguments], check=False).returncode
    if status not in check:
        raise SystemExit(status)
    return status


@contextmanager
def server(folder: Path, keys_file: Path) -> Iterator[Address]:
    words = [sys.executable, "-m", "serve", "--registry", str(folder / "registry"), "--http-port", "0"]
    words += ["--grpc-port", "0", "--records", str(folder / "records.sqlite"), "--derived", str(folder)]
    words += ["--api-keys", str(keys_file)]
    print("\n$ python -m " + shlex.join(words[2:]), flush=True)
    with (
        (folder / "server.log").open("w") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout
        try:
            line = process.stdout.readline()
            print(line, end="", flush=True)
            http, grpc = re.search(r"http://\S+?:\d+", line), re.search(r"grpc://(\S+?:\d+)", line)
            if not http or not grpc:
                raise SystemExit(f"the server did not start; see {log.name}")
            yield Address(http[0], grpc[1])
        finally:
            process.terminate()
            process.stdout.read()


def trial(loop: Loop) -> None:
    """People talk and judge until the canary has decided."""
    words = ("deploy", "canary", "--registry", loop.registry, "--records", loop.records, "--policy", POLICY)
    for number in range(TRIAL_ROUNDS):
        start = number * TRIAL_QUESTIONS % len(loop.asked)
        questions = loop.asked[start : start + TRIAL_QUESTIONS]
        loop.talk(questions, judge, seed=number)
        status = call(*words, check=(0, 3, 4))
        if status == EXIT_REFUSED:
            raise SystemExit("the canary refused the candidate")
        if status == 0:
            loop.results["trial_questions"] = TRIAL_QUESTIONS * (number + 1)
            return
    raise SystemExit("the trial did not end")


def roll_back(loop: Loop, bad: str, good: str) -> None:
    """While people talk without a pause, from one version to another and back."""

    async def talk() -> dict[str, Any]:
        found: dict[str, Any] = {}
        answers: list[tuple[float, Said]] = []
        ended = asyncio.Event()

        async def chat(person: Person, questions: Sequence[Question]) -> None:
            for question in cycle(questions):
                if ended.is_set():
                    return
                sent = time.monotonic()
                answers.append((sent, await person.ask(question)))

        async with Population(loop.address, loop.keys, seed=0) as people:
            crowd = [asyncio.create_task(chat(person, loop.unseen)) for person in people.people]
            await asyncio.sleep(3)
            for name, words, version in (
                ("rollback", ("rollback", bad), good),
                ("return", ("promote", bad), bad),
            ):
                began = time.monotonic()
                line = [sys.executable, "-m", "deploy", *words, "--registry", str(loop.registry)]
                process = await asyncio.create_subprocess_exec(*line, "--why", "make loop")
                if await process.wait():
                    raise SystemExit(f"{name} failed")
                while not any(sent > began and said.version == version[:12] for sent, said in answers):
                    await asyncio.sleep(0.01)
                first = min(sent for sent, said in answers if sent > began and said.version == version[:12])
                found[f"{name}_seconds"] = round(first - began, 2)
                await asyncio.sleep(2)
            ended.set()
            await asyncio.gather(*crowd)
        failed = [said.error for _, said in answers if said.error]
        return found | {"requests": len(answers), "failed": len(failed)}

    loop.results["rollback"] = asyncio.run(talk())
    print(f"\nrollback: {loop.results['rollback']}", flush=True)


def draw(results: dict[str, Any], path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.2))
        names = [row["round"] for row in results["rounds"]]
        for key, label, colour in (
            ("unseen_satisfied", "answered as people want it, unseen questions", OURS),
            ("other_satisfied", "the same, questions of another kind", OTHERS[0]),
            ("unseen_known", "answered rightly, unseen questions", GREY),
        ):
            values = [100 * row[key] for row in results["rounds"]]
            axes.plot(names, values, marker="o", color=colour, label=label)
        axes.set_ylabel("% of answers")
        axes.set_ylim(-3, 103)
        axes.legend(frameon=False, fontsize=8, loc="center right")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench.feedback_loop", description=__doc__)
    top.add_argument("--model", type=Path, default=Path("models/smollm2-135m-w8a8"), help="(default: %(default)s)")
    top.add_argument("--checkpoint", type=Path, default=Path("models/base"), help="of it (default: %(default)s)")
    top.add_argument("-o", "--output", type=Path, default=Path("runs/loop"), help="made anew (default: %(default)s)")
    return top


def main() -> int:
    args = parser().parse_args()
    started = time.monotonic()
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    keys_file = args.output / "keys.toml"
    keys = make_keys(keys_file, PEOPLE)
    registry = ("--registry", args.output / "registry")
    call("deploy", "publish", args.model, *registry, "--why", "the first")
    (first,) = [path.name for path in (args.output / "registry" / "versions").iterdir()]
    call("deploy", "promote", first, *registry, "--why", "the first")
    with server(args.output, keys_file) as address:
        loop = Loop(args.output, address, keys)

        def part(name: str, begun: float) -> float:
            now = time.monotonic()
            loop.results["seconds"][name] = round(now - begun)
            return now

        loop.measure("at first")
        loop.talk(loop.asked, judge)
        print(f"\n{len(loop.asked)} questions were asked, and the answers judged and corrected", flush=True)
        now = part("talking", started)
        if loop.retrain(args.checkpoint) == EXIT_REFUSED:
            raise SystemExit("the gate refused the candidate")
        now = part("retraining", now)
        trial(loop)
        better = json.loads((loop.registry / "current").read_text())["version"]
        while loop.talk(loop.unseen[:1])[0].version != better[:12]:
            pass  # the server has still to see it
        loop.measure("after one cycle")
        now = part("trial", now)
        roll_back(loop, better, first)
        loop.talk(loop.asked[:POISONED], poison, keys=STOLEN, seed=1)
        print(f"\n{STOLEN} stolen keys have corrected {POISONED} answers", flush=True)
        now = part("rollback and poison", now)
        if loop.retrain(args.checkpoint) != EXIT_REFUSED:
            raise SystemExit("the gate let poison pass")
        loop.measure("after poison")
        part("poisoned cycle", now)
    call("deploy", "history", *registry)
    call("deploy", "lineage", better, *registry)
    loop.results["seconds"]["all"] = round(time.monotonic() - started)
    (args.output / "loop.json").write_text(json.dumps(loop.results, indent=1) + "\n")
    draw(loop.results, args.output / "satisfied.svg")
    print(f"\n{json.dumps(loop.results, indent=1)}\n{args.output / 'satisfied.svg'} draws it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
