"""One turn of the retrain cycle: from what was said of the current version to a candidate on trial.

1 begin: freeze what it starts from and what it must show; 2 snapshot the records; 3 make a data set of the feedback;
4 share out the examples and mix in earlier ones; 5 finetune the current version's checkpoint; 6 quantize; 7 the gate;
8 publish. Every stage leaves digests of what it was made from and of what it is, see deploy/stages.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from compress.checkpoint import Checkpoint
from compress.gate import EXIT_GATE
from deploy.artifact_target import ArtifactTarget
from deploy.comparison import Verdict, compare, read_safety
from deploy.dataset import make_dataset
from deploy.examples import FRESH, JUDGE, LEARN, TESTED, Counts, mix, read_examples, read_lines
from deploy.policy import Policy, command_line, read_policy
from deploy.process import CommandFailed, run
from deploy.registry import Registry
from deploy.snapshot import Snapshot, snapshot
from deploy.stages import Digests, Done, Stages, write
from proto import lineage
from proto.lineage import LINEAGE, FolderLineage
from proto.manifest import MANIFEST, Lineage, digest_file, encode, load
from proto.records import utc_now

POLICY, SAFETY, HELD_OUT = "policy.toml", "safety.jsonl", "held_out.jsonl"
VERDICT = "verdict.json"
RECORDS = "records"
MODEL = "model"
ARTIFACT = "artifact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a cycle starts from. `earlier` are data to learn again, `tested` what earlier cycles were judged by.

    `began` is an ISO 8601 time.
    """

    number: int
    records: str
    since: int
    version: str
    checkpoint: Path
    earlier: Sequence[Path]
    tested: Sequence[Path]
    began: str


@dataclass(frozen=True, slots=True)
class Few:
    """Too little was said to learn from."""

    found: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Ended:
    """`version` is on trial, or None if a gate refused it."""

    why: str
    version: str | None


class Cycle:
    """In a folder of its own, in a process that holds the file descriptor `lock`."""

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        *,
        threads: int,
        lock: int,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self._registry = registry
        self._threads = threads
        self._lock = lock
        self._say = say
        self._stages = Stages(folder, say)

    def run(self, start: Start, frozen: Mapping[str, bytes]) -> Few | Ended:
        """`frozen` is copied into files as the cycle begins; a cycle that is resumed goes by what it began with."""
        begun = self._stages.run("begin", {}, partial(freeze, start, frozen), digests(*frozen))
        for name, data in frozen.items():
            if hashlib.sha256(data).hexdigest() != begun.outputs[name]:
                self._say(f"{name} is not what it was as this cycle began; it goes on with {begun.folder / name}")
        policy = read_policy(begun.folder / POLICY)
        began = msgspec.convert(begun.facts, Start, dec_hook=lambda kind, value: kind(value))
        taken = self._stages.run(
            "snapshot",
            {"since": str(began.since)},
            lambda folder: take_snapshot(began, folder),
            all_digests,
        )
        dataset = self._stages.run(
            "dataset",
            {**taken.outputs, **begun.outputs},
            lambda folder: make_dataset(taken.folder / RECORDS, folder, policy.limits, (begun.folder / HELD_OUT,)),
            all_digests,
        )
        source = dataset.folder / f"{policy.shape}.jsonl"
        found = len(read_lines(source)) if source.exists() else 0
        if found < policy.feedback.least_examples:
            return Few(found, policy.feedback.least_examples)
        examples = self._stages.run(
            "examples",
            {**dataset.outputs, POLICY: begun.outputs[POLICY]},
            lambda folder: share_out(source, lineage.read(dataset.folder), began, policy, folder),
            digests(LEARN, FRESH, JUDGE, TESTED),
        )
        finetuned = self._stages.run(
            "finetune",
            {LEARN: examples.outputs[LEARN], POLICY: begun.outputs[POLICY], "parent": began.version},
            lambda folder: self._finetune(began.checkpoint, examples.folder, policy, folder),
            lambda folder: {"checkpoint": Checkpoint(folder / MODEL).digest},
            resumes=True,
        )
        try:
            quantized = self._stages.run(
                "quantize",
                {**finetuned.outputs, POLICY: begun.outputs[POLICY]},
                lambda folder: self._quantize(finetuned.folder / MODEL, policy, began, examples.outputs, folder),
                lambda folder: {"version": load(folder / ARTIFACT).digest},
            )
        except CommandFailed as error:
            if error.status != EXIT_GATE:
                raise
            return Ended("it lost too much when it was quantized; see what `compress quantize` said", None)
        gate = self._stages.run(
            "gate",
            {
                **{name: examples.outputs[name] for name in (JUDGE, TESTED)},
                **quantized.outputs,
                **begun.outputs,
                "current": began.version,
            },
            lambda folder: self._judge(quantized.folder, began, policy, begun.folder, examples.folder, folder),
            digests(VERDICT),
        )
        verdict = msgspec.json.decode((gate.folder / VERDICT).read_bytes(), type=Verdict)
        if not verdict.passed:
            return Ended(verdict.explain(), None)
        self._stages.run(
            "publish",
            gate.outputs | quantized.outputs,
            lambda folder: self._publish(
                quantized.folder / ARTIFACT,
                began,
                policy,
                verdict,
                self._ancestry(began, dataset, {**finetuned.outputs, **begun.outputs, **examples.outputs}),
            ),
            lambda folder: {},
        )
        return Ended(verdict.explain(), quantized.outputs["version"])

    def _finetune(self, checkpoint: Path, examples: Path, policy: Policy, folder: Path) -> dict[str, Any]:
        work = folder / "run"
        if not (folder / MODEL).exists():
            copy_lineage(examples, work)  # while it is at work it holds the text, in tokens
            words = ["train", "run", str(checkpoint), "--data", str(examples / LEARN), "-o", str(work / "run")]
            run([*words, *command_line(policy.finetune)], lock=self._lock, threads=self._threads)
            shutil.copyfile(work / "run" / "metrics.jsonl", folder / "metrics.jsonl")
            (work / "run" / MODEL).rename(folder / MODEL)
        shutil.rmtree(work, ignore_errors=True)
        training = json.loads((folder / MODEL / "training.json").read_text())
        return {"steps": training["steps"], "tokens": training["tokens"], "metrics": training["metrics"]}

    def _quantize(self, model: Path, policy: Policy, start: Start, data: Digests, folder: Path) -> dict[str, Any]:
        """The artifact's lineage is written anew: by what it was made from, not by where that lay at the time."""
        made = folder / "made"
        name = self._registry.verify(start.version).name  # as clients know it
        words = ["compress", "quantize", str(model), "-o", str(made), "--name", name, "--threads", str(self._threads)]
        run([*words, *command_line(policy.quantize)], lock=self._lock, threads=self._threads)
        manifest = load(made)
        history = Lineage(
            checkpoint=manifest.lineage.checkpoint,
            datasets={**manifest.lineage.datasets, "feedback": data[FRESH], "finetune": data[LEARN]},
            tools=manifest.lineage.tools,
            command=f"python -m deploy retrain  # cycle {start.number}, from version {start.version}",
            created=start.began,
        )
        (made / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, lineage=history)))
        made.rename(folder / ARTIFACT)
        return {"gate": msgspec.to_builtins(manifest.gate)}

    def _judge(
        self, made: Path, start: Start, policy: Policy, begun: Path, examples: Path, folder: Path
    ) -> dict[str, Any]:
        with self._registry.open(start.version) as served:
            verdict = compare(
                ArtifactTarget(made / ARTIFACT, threads=self._threads, name="candidate"),
                ArtifactTarget(served, threads=self._threads, name="current"),
                held_out=read_examples(begun / HELD_OUT),
                judged=read_examples(examples / JUDGE),
                earlier=read_examples(examples / TESTED),
                safety=read_safety(begun / SAFETY),
                limits=policy.gate,
            )
        write(folder / VERDICT, verdict)
        return {"passed": verdict.passed}

    def _ancestry(self, start: Start, dataset: Done, inputs: Digests) -> FolderLineage:
        """What the version was made from, down to what people said; it is kept in the registry."""
        said = lineage.read(dataset.folder)
        return FolderLineage(
            kind="version",
            created=utc_now(),
            command=f"python -m deploy retrain  # cycle {start.number}",
            inputs={"parent": start.version, "dataset": said.digest, **inputs},
            interactions=said.interactions,
            feedback=said.feedback,
        )

    def _publish(self, artifact: Path, start: Start, policy: Policy, verdict: Verdict, ancestry: FolderLineage) -> None:
        who, why = f"retrain cycle {start.number}", verdict.explain()
        evidence = {"verdict": msgspec.to_builtins(verdict), "parent": start.version}
        version = self._registry.publish(artifact, by=who, why=why, evidence=evidence, ancestry=ancestry)
        if self._registry.state().candidate != version:
            self._registry.move("canary", version, by=who, why=why, share=policy.trial.share)


def take_snapshot(start: Start, folder: Path) -> dict[str, Any]:
    taken = snapshot(Snapshot(output=folder / RECORDS, records=start.records, since=start.since))
    return {"until": taken.until, "feedback": len(taken.feedback)}


def freeze(start: Start, frozen: Mapping[str, bytes], folder: Path) -> dict[str, Any]:
    for name, data in frozen.items():
        (folder / name).write_bytes(data)
    facts: dict[str, Any] = msgspec.to_builtins(start, enc_hook=str)
    return facts


def share_out(source: Path, said: FolderLineage, start: Start, policy: Policy, folder: Path) -> dict[str, Any]:
    before = dict.fromkeys([*start.earlier, *start.tested])
    own = FolderLineage(
        kind="dataset",
        created=utc_now(),
        command=f"python -m deploy retrain  # cycle {start.number}",
        inputs={"dataset": said.digest, **{f"earlier-{n}": made_by(path) for n, path in enumerate(before)}},
        oldest=said.oldest,
    )
    lineage.write(folder, own)
    counts: Counts = mix(
        source,
        start.earlier,
        folder,
        judged_share=policy.feedback.judged_share,
        replay_share=policy.feedback.replay_share,
        salt=str(start.number),
    )
    tested = [line for path in start.tested for line in read_lines(path)]
    (folder / TESTED).write_text("".join(line + "\n" for line in tested), encoding="utf-8")
    facts: dict[str, Any] = msgspec.to_builtins(counts)
    return facts


def made_by(path: Path) -> str:
    """The digest of the lineage that a file lies beside or, if it has none, its own."""
    return lineage.read(path.parent).digest if (path.parent / LINEAGE).exists() else digest_file(path)


def copy_lineage(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / LINEAGE, target / LINEAGE)


def digests(*names: str) -> Callable[[Path], Digests]:
    """Of these files of a stage's folder."""
    return lambda folder: {name: digest_file(folder / name) for name in names}


def all_digests(folder: Path) -> Digests:
    """Of all files but the lineage, which says when it was made."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LINEAGE)
    return {str(path.relative_to(folder)): digest_file(path) for path in files}
