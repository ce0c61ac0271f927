"""`python -m deploy canary`: judge the version on trial by what it answered and what people said of it, and act.

1 read the registry: which version is on trial, and which was promoted a short while ago; 2 read from the records what
it and the other version answered; 3 compare; 4 promote, reject or roll back, with the figures in the history, or let
it go on. Nothing is remembered between two looks, so one that was killed is made again.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from deploy.commands import Place
from deploy.errors import DeployError
from deploy.policy import DEFAULT, Trial, read_policy
from deploy.registry import Registry
from deploy.snapshot import RECORDS
from deploy.state import State
from deploy.traffic import Streams, Traffic, read_traffic
from deploy.trial import Findings, judge, side_by_side
from proto.records import utc_now
from proto.registry import Action, RegistryError
from serve.store import Store, StoreError, open_store
from train.flags import option

BY = "canary"
EXIT_REFUSED = 3
EXIT_OPEN = 4

Kind = Literal["trial", "watch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Place):
    records: str = option(RECORDS, "SQLite file or postgresql:// URL of interactions and feedback")
    policy: Path = option(DEFAULT, "what the version must show, in [trial]")
    watch: float = option(0.0, "look again every so many seconds, until it is ended; 0: once", least=0)
    dry_run: bool = option(False, "print the figures and move nothing")


class Evidence(Struct, frozen=True, kw_only=True):
    """What was seen of `new`, from `began` until `ended`; it stands in the history if something follows from it.

    `since` and `until` are cursors of the interactions, `policy` is the digest of the file.
    """

    kind: Kind
    new: str
    old: str
    began: str
    ended: str
    since: int
    until: int
    policy: str
    findings: Findings

    @property
    def hours(self) -> float:
        return hours(self.began, self.ended)

    def table(self) -> str:
        """For people."""
        counts = [
            f"{side} {number['answers']} answers, {number['people']} people"
            for side, number in self.findings.counts.items()
        ]
        lines = [
            f"{self.kind} of {self.new[:12]} (new) against {self.old[:12]} (old), {self.hours:.3g} hours",
            "; ".join(counts),
            f"{'':12}{'new':>10}{'old':>10}{'difference':>12}{'interval':>24}{'limit':>12}{'pairs':>8}",
        ]
        for name, f in self.findings.figures.items():
            new, old, value = ("-" if number is None else f"{number:.4g}" for number in (f.new, f.old, f.value))
            span = f"[{f.low:.4g}, {f.high:.4g}]"
            lines.append(f"{name:12}{new:>10}{old:>10}{value:>12}{span:>24}{f.limit:>12}{f.pairs:>8}  {f.verdict}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from the evidence: a movement of its new version, or none."""

    evidence: Evidence
    action: Action | None
    why: str


@dataclass(frozen=True, slots=True)
class Canary:
    """`anonymous`: feedback that no API key vouches for counts. `digest` is the policy's."""

    registry: Registry
    store: Store
    policy: Trial
    anonymous: bool
    digest: str

    def decide(self, state: State, now: str) -> Iterator[Decision]:
        """What to do about the version that was promoted last, if it is watched, and about the one on trial.

        Raises StoreError.
        """
        moved, trial = state.moved, state.trial
        if moved is None or state.current is None:
            return
        if moved.action == "promote" and isinstance(moved.evidence, dict) and moved.evidence.get("kind") == "trial":
            shown = msgspec.convert(moved.evidence, Evidence)
            if hours(moved.time, now) < self.policy.watch_hours:
                yield self._watch(shown, moved.time, now)
        if trial is not None and trial.share:
            yield self._trial(trial.version, state.current, max(trial.time, moved.time), now)

    def act(self, decision: Decision, seen: State) -> None:
        """Raises RegistryError if the versions were moved since they were `seen`, or the one to serve is damaged."""
        evidence = decision.evidence
        if decision.action is None:
            return
        if decision.action != "reject":
            self.registry.verify(evidence.old if decision.action == "rollback" else evidence.new)
        proof = msgspec.to_builtins(evidence)
        self.registry.move(decision.action, evidence.new, by=BY, why=decision.why, evidence=proof, seen=seen)

    def _trial(self, new: str, old: str, began: str, now: str) -> Decision:
        traffic = self._read(new, old, began, now)
        evidence = self._evidence("trial", new, old, began, now, traffic, traffic.streams)
        findings, told = evidence.findings, evidence.findings.explain()
        if findings.verdict != "open":
            return Decision(evidence, "promote" if findings.verdict == "kept" else "reject", told)
        if evidence.hours < self.policy.longest_hours:
            return Decision(evidence, None, told)
        why = f"undecided after {evidence.hours:.3g} hours and {findings.counts['new']['answers']} answers: {told}"
        return Decision(evidence, self.policy.undecided, why)

    def _watch(self, trial: Evidence, promoted: str, now: str) -> Decision:
        """What the version answers since it was promoted, against what the other one answered during the trial."""
        new, old = trial.new, trial.old
        early = self._read(new, old, trial.began, promoted)
        late = self._read(new, old, promoted, now)
        both = side_by_side(new, late.streams, early.streams)
        evidence = self._evidence("watch", new, old, promoted, now, late, both)
        broken = evidence.findings.verdict == "broken"
        return Decision(evidence, "rollback" if broken else None, evidence.findings.explain())

    def _read(self, new: str, old: str, began: str, ended: str) -> Traffic:
        settle = self.policy.settle_seconds
        return read_traffic(self.store, (new, old), began, ended, settle_seconds=settle, anonymous=self.anonymous)

    def _evidence(
        self, kind: Kind, new: str, old: str, began: str, now: str, traffic: Traffic, streams: Streams
    ) -> Evidence:
        return Evidence(
            kind=kind,
            new=new,
            old=old,
            began=began,
            ended=now,
            since=traffic.since,
            until=traffic.until,
            policy=self.digest,
            findings=judge(new, streams, self.policy),
        )


def run(options: Options) -> int:
    policy = read_policy(options.policy)
    canary = Canary(
        Registry(options.registry),
        open_store(options.records),
        policy.trial,
        policy.limits.anonymous,
        hashlib.sha256(options.policy.read_bytes()).hexdigest(),
    )
    if not options.dry_run:
        canary.registry.settle()
    if not options.watch:
        return look(canary, options.dry_run)
    ended = threading.Event()
    earlier = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not ended.is_set():
            try:
                look(canary, options.dry_run)
            except (DeployError, RegistryError, OSError) as error:
                say(str(error))  # a database that is away, or somebody who moved versions meanwhile: look again
            ended.wait(options.watch)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return 0


def look(canary: Canary, dry_run: bool) -> int:
    """Once; the exit status. Raises DeployError, RegistryError or OSError."""
    status = 0
    state = canary.registry.state()
    try:
        for decision in canary.decide(state, utc_now()):
            kind, new, old = decision.evidence.kind, decision.evidence.new, decision.evidence.old
            if dry_run:
                print(decision.evidence.table())
                print(f"this would {decision.action}" if decision.action else f"the {kind} goes on")
            else:
                canary.act(decision, state)
                what = decision.action or f"the {kind} goes on"
                say(f"{what}: {new[:12]} against {old[:12]}: {decision.why}")
            if decision.action is not None:
                return 0 if decision.action == "promote" else EXIT_REFUSED
            status = EXIT_OPEN if kind == "trial" else status
    except StoreError as error:
        raise DeployError(str(error)) from error
    return status


def say(text: str) -> None:
    print(f"{utc_now()} {text}", flush=True)


def hours(began: str, ended: str) -> float:
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds() / 3600


COMMANDS = {"canary": (Options, run)}
