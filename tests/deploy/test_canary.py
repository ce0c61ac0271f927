"""`python -m deploy canary`: versions that simulated people talk to are promoted, rejected and rolled back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from deploy import canary
from deploy.canary import EXIT_OPEN, EXIT_REFUSED, Options, run
from deploy.errors import DeployError
from deploy.policy import DEFAULT
from deploy.registry import Registry
from proto.manifest import WEIGHTS
from proto.registry import Movement, RegistryError, version_folder
from serve.metrics import Metrics
from serve.registry import History
from serve.sqlite_store import SqliteStore
from tests.deploy.talk import Behaviour, Clock, answer, said, talk

SHARE = 0.5
LIMITS = {
    "error_increase": 0.1,
    "abort_increase": 0.1,
    "ttft_ratio": 1.5,
    "token_time_ratio": 1.5,
    "approval_loss": 0.0,
    "settle_seconds": 300.0,
    "longest_hours": 2.0,
    "watch_hours": 24.0,
}


@dataclass
class World:
    """A registry in which `old` is current and `new` on trial, records, and a policy with LIMITS."""

    root: Path
    clock: Clock
    registry: Registry
    store: SqliteStore
    old: str
    new: str

    @property
    def options(self) -> Options:
        root = self.root
        return Options(
            registry=str(root / "registry"), records=str(root / "records.sqlite"), policy=root / "policy.toml"
        )

    def policy(self, **changes: float | str) -> None:
        lines = DEFAULT.read_text().splitlines()
        for name, value in {**LIMITS, **changes}.items():
            (at,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} = "))
            lines[at] = f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
        (self.root / "policy.toml").write_text("\n".join(lines))

    def talk(self, people: int, old: Behaviour, new: Behaviour, *, share: float = SHARE, seed: int = 0) -> None:
        talk(self.store, self.clock, people, seed=seed, share=share, versions={self.old: old, self.new: new})

    def last(self) -> Movement:
        return self.registry.history()[-1]


@pytest.fixture
def world(tmp_path: Path, artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    clock = Clock()
    monkeypatch.setattr("deploy.canary.utc_now", clock)
    monkeypatch.setattr("deploy.registry.utc_now", clock)
    registry = Registry(str(tmp_path / "registry"))
    old, new, _ = artifacts
    for version in (old, new):
        registry.publish(artifacts[version], by="test", why="test")
    registry.move("promote", old, by="test", why="test")
    registry.move("canary", new, by="test", why="test", share=SHARE)
    store = SqliteStore(tmp_path / "records.sqlite")
    store.open()
    made = World(tmp_path, clock, registry, store, old, new)
    made.policy()
    yield made
    store.close()


def test_a_better_version_is_promoted_with_its_figures(world: World) -> None:
    assert run(world.options) == EXIT_OPEN
    world.talk(400, Behaviour(liked=0.2), Behaviour(liked=0.9))
    assert run(world.options) == 0
    state = world.registry.state()
    assert (state.current, state.candidate) == (world.new, None)
    moved = world.last()
    assert (moved.action, moved.by, moved.time) == ("promote", "canary", world.clock())
    evidence = moved.evidence
    assert isinstance(evidence, dict)
    assert (evidence["kind"], evidence["new"], evidence["old"]) == ("trial", world.new, world.old)
    assert (evidence["since"], evidence["until"]) == (0, 400)
    findings = evidence["findings"]
    assert findings["counts"]["new"]["answers"] + findings["counts"]["old"]["answers"] == 400
    figure = findings["figures"]["approval"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert figure["low"] > 0
    assert figure["value"] == pytest.approx(1.4, abs=0.3)
    assert figure["verdict"] == "kept"
    assert f"[{figure['low']:.4g}, {figure['high']:.4g}] keeps >= 0" in moved.why


@pytest.mark.parametrize(
    ("new", "figure"),
    [
        (Behaviour(liked=0.1), "approval"),
        (Behaviour(errors=1.0), "errors"),
        (Behaviour(liked=0.8, slower=4.0), "token_time"),
    ],
)
def test_a_worse_version_is_rejected_early(
    new: Behaviour, figure: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.talk(120, Behaviour(liked=0.8), new)
    assert run(world.options) == EXIT_REFUSED
    assert (world.registry.state().current, world.registry.state().candidate) == (world.old, None)
    assert world.last().action == "reject"
    assert f"{figure} " in world.last().why
    assert "BREAKS" in world.last().why
    assert f"reject: {world.new[:12]} against {world.old[:12]}: " in capsys.readouterr().out


@pytest.mark.parametrize(("undecided", "status"), [("reject", EXIT_REFUSED), ("promote", 0)])
def test_a_trial_that_shows_neither_ends_as_the_policy_says(undecided: str, status: int, world: World) -> None:
    world.policy(undecided=undecided)
    world.talk(100, Behaviour(), Behaviour())
    assert run(world.options) == EXIT_OPEN
    assert world.registry.state().candidate == world.new
    world.clock.later(2 * 3600)
    assert run(world.options) == status
    assert world.last().action == undecided
    assert world.last().why.startswith("undecided after 2.19 hours and ")


def test_a_candidate_that_never_answers_is_rejected_in_the_end(world: World) -> None:
    world.talk(50, Behaviour(), Behaviour(), share=0.0)
    world.clock.later(2 * 3600)
    assert run(world.options) == EXIT_REFUSED
    assert " hours and 0 answers" in world.last().why


def test_what_was_answered_before_the_trial_does_not_count(world: World) -> None:
    world.talk(200, Behaviour(liked=0.8), Behaviour(liked=0.1))
    world.registry.move("canary", world.new, by="test", why="anew", share=0.4)
    assert run(world.options) == EXIT_OPEN
    world.talk(200, Behaviour(liked=0.8), Behaviour(liked=0.1), seed=1)
    assert run(world.options) == EXIT_REFUSED


def promote(world: World) -> None:
    world.talk(400, Behaviour(liked=0.2), Behaviour(liked=0.9))
    assert run(world.options) == 0
    assert world.registry.state().current == world.new


def test_a_promoted_version_that_turns_bad_is_rolled_back(world: World) -> None:
    promote(world)
    assert run(world.options) == 0
    world.talk(120, Behaviour(), Behaviour(liked=0.9, errors=0.7), share=1.0)
    assert run(world.options) == EXIT_REFUSED
    assert world.registry.state().current == world.old
    moved = world.last()
    assert (moved.action, moved.version, moved.by) == ("rollback", world.new, "canary")
    assert isinstance(moved.evidence, dict)
    assert moved.evidence["kind"] == "watch"
    assert moved.why.startswith("errors ")
    assert run(world.options) == 0  # and that is the end of it


def test_a_promoted_version_that_stays_good_is_left_alone(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    promote(world)
    world.talk(200, Behaviour(), Behaviour(liked=0.9), share=1.0)
    assert run(world.options) == 0
    assert f"the watch goes on: {world.new[:12]} against {world.old[:12]}: " in capsys.readouterr().out
    world.talk(200, Behaviour(), Behaviour(errors=1.0), share=1.0)
    world.clock.later(24 * 3600)
    assert run(world.options) == 0  # it is over
    assert world.last().action == "promote"
    assert capsys.readouterr().out == ""


def test_what_a_person_promoted_is_not_rolled_back(world: World) -> None:
    world.registry.move("promote", world.new, by="ann", why="I know better")
    world.talk(200, Behaviour(), Behaviour(errors=1.0), share=1.0)
    assert run(world.options) == 0
    assert world.last().by == "ann"


def test_the_next_trial_goes_on_beside_the_watch(world: World, artifacts: dict[str, Path]) -> None:
    promote(world)
    third = next(version for version in artifacts if version not in (world.old, world.new))
    world.registry.publish(artifacts[third], by="test", why="test")
    world.registry.move("canary", third, by="test", why="test", share=SHARE)
    better = replace(world, old=world.new, new=third)
    better.talk(400, Behaviour(liked=0.8), Behaviour(liked=0.1))
    assert run(world.options) == EXIT_REFUSED
    assert [(m.action, m.version) for m in world.registry.history()[-1:]] == [("reject", third)]


def test_a_dry_run_shows_the_figures_and_moves_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.talk(400, Behaviour(liked=0.2), Behaviour(liked=0.9))
    before = world.registry.history()
    assert run(replace(world.options, dry_run=True)) == 0
    assert world.registry.history() == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"trial of {world.new[:12]} (new) against {world.old[:12]} (old), 0.278 hours")
    assert [line.split()[0] for line in lines[3:8]] == ["errors", "aborts", "ttft", "token_time", "approval"]
    assert {line.split()[-1] for line in lines[3:8]} == {"kept"}
    assert lines[8:] == ["this would promote"]


def test_nothing_to_do_is_nothing_done(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.registry.move("canary", world.new, by="test", why="test", share=0.0)  # it answers who names it
    assert run(world.options) == 0
    world.registry.move("reject", world.new, by="test", why="test")
    assert run(world.options) == 0
    assert run(replace(world.options, registry=str(tmp_path / "empty"))) == 0
    assert capsys.readouterr().out == ""


def test_feedback_without_a_key_counts_only_if_the_policy_says_so(world: World) -> None:
    chats = [answer((world.old, world.new)[number % 2], world.clock.later(1)) for number in range(300)]
    likes = [said(chat, chat.created, chat.model_digest == world.old, source=None) for chat in chats]
    world.store.append([*chats, *likes])
    world.clock.later(600)
    assert run(world.options) == EXIT_OPEN
    text = (world.root / "policy.toml").read_text()
    (world.root / "policy.toml").write_text(text.replace("anonymous = false", "anonymous = true"))
    assert run(world.options) == EXIT_REFUSED


def test_a_damaged_version_is_not_promoted(world: World) -> None:
    world.talk(400, Behaviour(liked=0.2), Behaviour(liked=0.9))
    weights = world.root / "registry" / version_folder(world.new) / WEIGHTS
    weights.chmod(0o600)
    weights.write_text("else")
    with pytest.raises(RegistryError, match="is damaged"):
        run(world.options)
    assert world.registry.state().current == world.old


def test_a_decision_about_what_has_changed_meanwhile_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.talk(400, Behaviour(liked=0.2), Behaviour(liked=0.9))
    plain = canary.judge

    def judge_slowly(*args: object) -> canary.Findings:
        world.registry.move("reject", world.new, by="ann", why="I do not like it")
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(canary, "judge", judge_slowly)
    with pytest.raises(RegistryError, match="were moved meanwhile; look at them again"):
        run(world.options)
    assert world.last().by == "ann"


def test_pointers_that_a_killed_process_left_behind_are_set_right(world: World) -> None:
    promote(world)
    pointer = world.root / "registry/current"
    pointer.write_bytes(pointer.read_bytes().replace(world.new.encode(), world.old.encode()))
    assert run(world.options) == 0
    assert world.new in pointer.read_text()


def test_watching_goes_on_through_trouble_until_it_is_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if len(told) == 1:
            world.store.append([answer(world.old, world.clock.later(1))])
        if len(told) == 2:
            world.talk(400, Behaviour(liked=0.2), Behaviour(liked=0.9))
        if len(told) == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(canary, "say", say)
    world.store.close()
    world.store.path.unlink()
    handler = signal.getsignal(signal.SIGTERM)
    assert run(replace(world.options, watch=0.001)) == 0
    assert "cannot be read" in told[0]
    assert [text.split(":")[0] for text in told[1:]] == ["the trial goes on", "promote", "the watch goes on"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_records_that_cannot_be_read_are_told(world: World) -> None:
    with pytest.raises(DeployError, match="cannot be read"):
        run(replace(world.options, records=str(world.root / "nowhere.sqlite")))


def test_decisions_are_counted_in_the_servers_metrics(world: World) -> None:
    promote(world)
    world.talk(200, Behaviour(), Behaviour(errors=1.0), share=1.0)
    run(world.options)
    world.registry.move("canary", world.new, by="test", why="again", share=SHARE)
    world.talk(200, Behaviour(), Behaviour(errors=1.0))
    run(world.options)
    metrics = Metrics("m")
    for movement in History(world.root / "registry").news():
        metrics.moved(movement)
    counts = {
        action: metrics.registry.get_sample_value("pawl_decisions_total", {"action": action})
        for action in ("publish", "canary", "promote", "rollback", "reject")
    }
    assert counts == {"publish": 2, "canary": 2, "promote": 2, "rollback": 1, "reject": 1}
