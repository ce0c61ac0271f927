"""The retrain cycle, whole: what it makes, what it refuses, and that no kill changes what comes out."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.quantize import Options, quantize
from deploy.errors import DeployError
from deploy.lock import exclusive
from deploy.registry import Registry
from deploy.retrain import EXIT_GATE
from tests.deploy import small_loop
from tests.deploy.small_loop import SECRET, STAGES, digests, make_policy, make_records, run_cycle
from tests.serve.tiny import TEXT
from tests.train.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
EPOCH = "1760000000"  # 2025-10-09T08:53:20Z


@pytest.fixture(scope="session")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that serves a tiny model, and 30 people who were not content with it."""
    root = tmp_path_factory.mktemp("seed")
    torch.manual_seed(0)
    make_checkpoint(root / "checkpoint", hidden_size=64, intermediate_size=96)
    (root / "text.txt").write_text(TEXT * 4)
    quantize(
        root / "checkpoint",
        root / "artifact",
        Options(
            text=root / "text.txt",
            window=64,
            calibration_windows=2,
            held_out_windows=2,
            force=True,
            measure=False,
            name="tiny",
        ),
        command="test",
        threads=1,
    )
    registry = Registry(str(root / "registry"))
    version = registry.publish(root / "artifact", by="ann", why="the first")
    registry.move("promote", version, by="ann", why="the first")
    make_records(root / "records.sqlite", version, range(30))
    held_out = [{"prompt": f"Tell me {n}.", "completion": f"{SECRET} {n}"} for n in range(12)]
    (root / "held_out.jsonl").write_text("".join(json.dumps(example) + "\n" for example in held_out))
    (root / "safety.jsonl").write_text(small_loop.SAFETY)
    make_policy(root)
    return root


@pytest.fixture
def make_root(seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A copy of `seed`, or of a folder that was made from it."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)

    def make(name: str, source: Path = seed) -> Path:
        root = tmp_path / name
        shutil.copytree(source, root)
        return root

    return make


@pytest.fixture(scope="session")
def undisturbed(seed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cycle, without a kill."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    shutil.copytree(seed, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", EPOCH)
        assert run_cycle(root) == 0
    return root


def test_feedback_becomes_a_candidate_on_trial(undisturbed: Path) -> None:
    registry = Registry(str(undisturbed / "registry"))
    state = registry.state()
    assert state.candidate
    assert state.trial
    assert state.trial.share == 0.25
    manifest = registry.verify(state.candidate)
    first = registry.verify(str(state.current))
    assert manifest.name == first.name == "tiny"
    assert manifest.lineage.checkpoint != first.lineage.checkpoint
    assert manifest.lineage.created == "2025-10-09T08:53:20+00:00"
    outcome = json.loads((undisturbed / "cycles/0001/outcome.json").read_text())
    assert (outcome["verdict"], outcome["version"], outcome["until"]) == ("published", state.candidate, 30)
    assert {name[3:] for name in digests(undisturbed)} == {*STAGES}
    ancestry = registry.ancestry(state.candidate)
    assert ancestry
    assert (len(ancestry.feedback), ancestry.inputs["parent"]) == (30, state.current)
    verdict = registry.history()[-2].evidence["verdict"]  # type: ignore[call-overload,index]
    assert verdict["passed"]
    assert verdict["figures"]["feedback_gain"]["low"] > 0
    assert verdict["figures"]["held_out_perplexity_ratio"]["high"] < 1.02
    assert not list((undisturbed / "cycles").rglob("*.incomplete"))
    told = (undisturbed / "retrain.prom").read_text()
    assert 'pawl_retrain_last_verdict{verdict="published"} 1.0' in told
    assert all(f'pawl_retrain_stage_seconds{{stage="{stage}"}}' in told for stage in STAGES[1:])


def test_a_finished_cycle_is_not_repeated(
    undisturbed: Path, make_root: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_root("root", undisturbed)
    (root / "retrain.prom").unlink()
    assert run_cycle(root) == 0
    assert "is on trial: nothing is done until it is promoted or rejected" in capsys.readouterr().out
    assert (root / "retrain.prom").exists()  # so that nobody is told that retraining has stopped
    registry = Registry(str(root / "registry"))
    registry.move("promote", registry.resolve("candidate"), by="ann", why="good")
    assert run_cycle(root) == 0  # nothing was said since
    assert [path.name for path in (root / "cycles").iterdir() if path.is_dir()] == ["0001"]


def test_the_next_cycle_goes_on_from_the_last(undisturbed: Path, make_root: Callable[..., Path]) -> None:
    root = make_root("root", undisturbed)
    registry = Registry(str(root / "registry"))
    second = registry.resolve("candidate")
    registry.move("promote", second, by="ann", why="good")
    make_records(root / "records.sqlite", second, range(30, 60))
    make_policy(root, feedback_gain=100.0)
    assert run_cycle(root) == EXIT_GATE
    begun = json.loads((root / "cycles/0002/stages/01-begin.json").read_text())
    assert begun["facts"]["since"] == 30
    assert begun["facts"]["checkpoint"].endswith("0001/05-finetune/model")
    counts = json.loads((root / "cycles/0002/stages/04-examples.json").read_text())["facts"]
    assert counts["earlier"] == round(counts["fresh"] / 3)
    assert registry.state().candidate is None
    assert json.loads((root / "cycles/0002/outcome.json").read_text())["verdict"] == "rejected"


def test_what_quantizing_harms_is_rejected(make_root: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = make_root("root")
    policy = root / "policy.toml"
    policy.write_text(policy.read_text().replace("force = true", 'gate = "kl<=0.0000001"'))
    assert run_cycle(root) == EXIT_GATE
    assert "it lost too much when it was quantized" in capsys.readouterr().out
    outcome = json.loads((root / "cycles/0001/outcome.json").read_text())
    assert (outcome["verdict"], outcome["until"]) == ("rejected", 30)
    assert Registry(str(root / "registry")).state().candidate is None


def test_too_little_feedback_starts_nothing(make_root: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = make_root("root")
    (root / "records.sqlite").unlink()
    make_records(root / "records.sqlite", "0" * 64, range(5))
    assert run_cycle(root) == 0
    assert "5 examples since the last cycle, and the policy wants 8: nothing is done" in capsys.readouterr().out
    assert not (root / "cycles/0001").exists()


def test_kills_at_every_stage_change_nothing(undisturbed: Path, make_root: Callable[..., Path]) -> None:
    """One cycle that is killed at every stage, when its work was done and not yet marked, and after the last mark."""
    root = make_root("killed")
    for stage, moment in [*((stage, "before") for stage in STAGES), (STAGES[-1], "after")]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.deploy.small_loop", str(root), stage, moment], cwd=ROOT, check=False
        )
        assert done.returncode == -signal.SIGKILL, (stage, moment)
    assert run_cycle(root) == 0
    assert comparable(root) == comparable(undisturbed)
    one, other = Registry(str(root / "registry")), Registry(str(undisturbed / "registry"))
    assert one.state().candidate == other.state().candidate
    assert [m.action for m in one.history()] == [m.action for m in other.history()]


def comparable(root: Path) -> str:
    """Digests by stage, which hold for any folder: the policy of each names its own."""
    policy = json.loads((root / "cycles/0001/stages/01-begin.json").read_text())["outputs"]["policy.toml"]
    return json.dumps(digests(root), sort_keys=True).replace(policy, "POLICY")


def test_a_second_cycle_at_once_is_refused(make_root: Callable[..., Path]) -> None:
    root = make_root("root")
    with (
        exclusive(root / "cycles/lock", wait=False),
        pytest.raises(DeployError, match=rf"lock is held by process {os.getpid()} on .* since"),
    ):
        run_cycle(root)


def test_what_cannot_be_begun_is_said(make_root: Callable[..., Path]) -> None:
    root = make_root("root")
    with pytest.raises(DeployError, match="which no cycle here has; give --checkpoint"):
        run_cycle(root, checkpoint="")
    make_checkpoint(root / "other")
    with pytest.raises(DeployError, match="give that one"):
        run_cycle(root, checkpoint=str(root / "other"))
    with pytest.raises(DeployError, match="serves nothing yet"):
        run_cycle(root, registry=str(root / "nowhere"))
    (root / "policy.toml").write_text("[feedback]\nleast_examples = 0\n")
    with pytest.raises(DeployError, match="least_examples"):
        run_cycle(root)


def test_a_cycle_whose_beginning_is_outdated_is_abandoned(
    make_root: Callable[..., Path], artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_root("root")
    killed = [sys.executable, "-m", "tests.deploy.small_loop", str(root), "dataset", "after"]
    assert subprocess.run(killed, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    other, path = next(iter(artifacts.items()))
    registry = Registry(str(root / "registry"))
    first = registry.resolve("current")
    registry.publish(path, by="ann", why="another")
    registry.move("promote", other, by="ann", why="another")
    with pytest.raises(DeployError, match=r"which no cycle here has|give that one"):
        run_cycle(root)
    assert f"it began from version {first[:12]}, and {other[:12]} is current by now" in capsys.readouterr().err
    assert json.loads((root / "cycles/0001/outcome.json").read_text())["verdict"] == "abandoned"
    registry.move("rollback", other, by="ann", why="no")
    make_policy(root, least_examples=100)
    assert run_cycle(root) == 0  # what the abandoned one took is there again
    assert "30 examples since the last cycle, and the policy wants 100" in capsys.readouterr().out


def test_an_unfinished_cycle_goes_by_the_policy_it_began_with(
    make_root: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_root("root")
    killed = [sys.executable, "-m", "tests.deploy.small_loop", str(root), "begin", "after"]
    make_policy(root, least_examples=100)
    assert subprocess.run(killed, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    make_policy(root)
    assert run_cycle(root) == 0
    told = capsys.readouterr()
    assert "policy.toml is not what it was as this cycle began" in told.err
    assert "30 examples since the last cycle, and the policy wants 100" in told.out
    assert not (root / "cycles/0001").exists()


def test_the_cycles_commands_die_with_it_and_hold_its_lock(tmp_path: Path) -> None:
    """Else what a killed cycle had begun would write beside the one that goes on."""
    (tmp_path / "slow.py").write_text("import os, sys\nprint(os.getpid(), flush=True)\nsys.stdin.read()\n")
    program = f"""
from pathlib import Path
from deploy import process
from deploy.lock import exclusive
process.ROOT = Path({str(tmp_path)!r})
with exclusive(process.ROOT / "lock", wait=False) as lock:
    process.run(["slow"], lock=lock, threads=1)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    with pytest.raises(DeployError, match=f"held by process {parent.pid} "), exclusive(tmp_path / "lock", wait=False):
        pass
    watched = os.pidfd_open(child)
    parent.kill()
    assert select.select([watched], [], [], 60)[0]  # readable once it has ended
    os.close(watched)
    parent.communicate()
    with exclusive(tmp_path / "lock", wait=False):
        pass
