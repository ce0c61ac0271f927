"""`python -m deploy retrain`: go on with the cycle that was begun, or begin one if enough was said since the last.

The folder WORK holds `lock` and the cycles `0001`, `0002` and so on, each with `outcome.json` once it has ended.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from compress.checkpoint import Checkpoint, CheckpointError
from compress.corpus import default_texts
from compress.gate import EXIT_GATE
from deploy.cycle import HELD_OUT, POLICY, SAFETY, VERDICT, Cycle, Few, Start
from deploy.cycle_metrics import as_metrics
from deploy.errors import DeployError
from deploy.examples import FRESH, JUDGE
from deploy.lock import exclusive
from deploy.policy import DEFAULT, read_policy
from deploy.registry import Registry
from deploy.snapshot import RECORDS
from deploy.stages import Marker, write
from monitoring import textfile
from proto.records import utc_now
from serve.machine import cpu_quota
from train.flags import option

OUTCOME = "outcome.json"
HELD_OUT_TEXTS = 48  # of the texts that every interpreter carries, where no files are given
HELD_OUT_CHARACTERS = 2000  # of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    registry: str = option("data/registry", "folder, or URL that fsspec has a driver for")
    work: Path = option(Path("data/cycles"), "folder of the cycles; the same one every time")
    records: str = option(RECORDS, "SQLite file or postgresql:// URL of interactions and feedback")
    checkpoint: str = option("", "checkpoint of the current version, where no cycle made it")
    held_out: tuple[Path, ...] = option(
        (), "JSONL files to judge by, as `train eval` takes for perplexity (default: texts that Python carries)"
    )
    replay: tuple[Path, ...] = option((), "JSONL files of earlier data to learn again, of the objective's shape")
    policy: Path = option(DEFAULT, "what a cycle may do, and what its candidate must show")
    safety: Path = option(DEFAULT.with_name(SAFETY), "canned prompts, and what an answer must and must not hold")
    threads: int = option(0, "compute threads; 0: the CPU quota", least=0)
    textfile: Path | None = option(None, "gauges to write, for node_exporter's textfile collector", parse=Path)
    abandon: bool = option(False, "give up the cycle that was begun; what was said goes into the next")


class Outcome(Struct, frozen=True, kw_only=True):
    """How a cycle ended. `until` is where the next one's feedback begins; an abandoned one took none."""

    verdict: Literal["published", "rejected", "abandoned"]
    why: str
    finished: str
    until: int = 0
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A cycle's folder."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def outcome(self) -> Outcome | None:
        path = self.folder / OUTCOME
        return msgspec.json.decode(path.read_bytes(), type=Outcome) if path.exists() else None

    def marker(self, stage: str) -> Marker | None:
        found = list((self.folder / "stages").glob(f"*-{stage}.json"))
        return msgspec.json.decode(found[0].read_bytes(), type=Marker) if found else None

    @property
    def markers(self) -> list[Marker]:
        """Of the stages that were made, in their order."""
        found = sorted((self.folder / "stages").glob("[0-9][0-9]-*.json"))
        return [msgspec.json.decode(path.read_bytes(), type=Marker) for path in found]

    def stage(self, stage: str) -> Path | None:
        return next(iter(self.folder.glob(f"[0-9][0-9]-{stage}")), None)

    def end(self, verdict: Literal["published", "rejected", "abandoned"], why: str, **more: Any) -> None:
        write(self.folder / OUTCOME, Outcome(verdict=verdict, why=why, finished=utc_now(), **more))


def retrain(options: Options) -> int:
    """One cycle, or the rest of one; the exit status. Raises DeployError if another process is at it."""
    with exclusive(options.work / "lock", wait=False) as lock:
        registry = Registry(options.registry)
        state = registry.settle()
        if state.current is None:
            raise DeployError(f"{options.registry} serves nothing yet; publish and promote a first version")
        frozen = read_frozen(options)
        turns = find_turns(options.work)
        last = turns[-1] if turns and turns[-1].outcome is None else None
        if last is not None and (why := outdated(last, state.current, options.abandon)):
            say(f"cycle {last.number} is abandoned: {why}")
            last.end("abandoned", why)
            last = None
        if last is None and state.candidate:
            print(f"version {state.candidate[:12]} is on trial: nothing is done until it is promoted or rejected")
            return leave_figures(options, 0)
        if last is None:
            last = Turn(options.work / f"{len(turns) + 1:04}")
        start = Start(
            number=last.number,
            records=options.records,
            since=max([turn.outcome.until for turn in turns if turn.outcome], default=0),
            version=state.current,
            checkpoint=find_checkpoint(registry, state.current, options.checkpoint, turns),
            earlier=[*options.replay, *kept(turns, state.line, FRESH)],
            tested=kept(turns, state.line, JUDGE),
            began=began(),
        )
        cycle = Cycle(
            last.folder,
            registry,
            threads=options.threads or cpu_quota()[0],
            lock=lock,
            say=say,
        )
        return leave_figures(options, conclude(last, cycle.run(start, frozen), registry))


def leave_figures(options: Options, status: int) -> int:
    """For node_exporter, if asked; gives the exit status that it was given."""
    if options.textfile is not None:
        textfile.write(options.textfile, as_metrics(find_turns(options.work), VERDICT))
    return status


def find_turns(work: Path) -> list[Turn]:
    """All that were begun, in their order."""
    return [Turn(folder) for folder in sorted(work.glob("[0-9][0-9][0-9][0-9]"))]


def conclude(turn: Turn, result: Any, registry: Registry) -> int:
    """Keep and tell how the cycle ended."""
    if isinstance(result, Few):
        shutil.rmtree(turn.folder)  # what was said so far goes into the next one
        print(f"{result.found} examples since the last cycle, and the policy wants {result.wanted}: nothing is done")
        return 0
    taken = turn.marker("snapshot")
    until = taken.facts["until"] if taken else 0
    told = result.why
    if result.version is None:
        turn.end("rejected", told, until=until)
        print(f"cycle {turn.number}: the gate refused the candidate and nothing was published: {told}")
        return EXIT_GATE
    turn.end("published", told, until=until, version=result.version)
    print(f"cycle {turn.number}: version {result.version[:12]} is on trial in {registry.url}: {told}")
    return 0


def outdated(turn: Turn, current: str, abandon: bool) -> str:
    """Why the cycle cannot be gone on with, or ""."""
    if abandon:
        return "--abandon"
    begun = turn.marker("begin")
    if begun and begun.facts["version"] != current:
        return f"it began from version {begun.facts['version'][:12]}, and {current[:12]} is current by now"
    return ""


def find_checkpoint(registry: Registry, version: str, given: str, turns: list[Turn]) -> Path:
    """The checkpoint that the version was made of. Raises DeployError if it is nowhere."""
    wanted = registry.verify(version).lineage.checkpoint
    for turn in reversed(turns):
        marker, folder = turn.marker("finetune"), turn.stage("finetune")
        if marker and folder and marker.outputs["checkpoint"] == wanted:
            return folder / "model"
    if not given:
        raise DeployError(
            f"version {version[:12]} was made of checkpoint {wanted[:12]}, which no cycle here has; give --checkpoint"
        )
    try:
        found = Checkpoint(given).digest
    except CheckpointError as error:
        raise DeployError(str(error)) from error
    if found != wanted:
        raise DeployError(
            f"--checkpoint {given} is {found[:12]}, and version {version[:12]} was made of {wanted[:12]}; give that one"
        )
    return Path(given)


def kept(turns: list[Turn], line: tuple[str, ...], name: str) -> list[Path]:
    """A file of examples of every cycle whose version is served, or was until a later one took over."""
    good = [turn for turn in turns if turn.outcome and turn.outcome.version in line]
    folders = [folder for turn in good if (folder := turn.stage("examples"))]
    return [folder / name for folder in folders if (folder / name).exists()]  # not after an erasure


def read_frozen(options: Options) -> dict[str, bytes]:
    read_policy(options.policy)
    if options.held_out:
        held_out = b"".join(path.read_bytes().rstrip(b"\n") + b"\n" for path in options.held_out)
    else:
        texts = [text[:HELD_OUT_CHARACTERS] for text in default_texts()[1][:HELD_OUT_TEXTS]]
        held_out = b"".join(msgspec.json.encode({"text": text}) + b"\n" for text in texts)
    return {
        POLICY: options.policy.read_bytes(),
        SAFETY: options.safety.read_bytes(),
        HELD_OUT: held_out,
    }


def began() -> str:
    """Now, or what SOURCE_DATE_EPOCH says, so that a cycle can be made again to the bit (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.isoformat(timespec="seconds")


def say(text: str) -> None:
    print(f"retrain: {text}", file=sys.stderr, flush=True)


COMMANDS = {"retrain": (Options, retrain)}
