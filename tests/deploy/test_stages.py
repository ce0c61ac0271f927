"""Stages are made once, and again when what they were made from, or what they made, is not what it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.errors import DeployError
from deploy.policy import DEFAULT, command_line, read_policy
from deploy.stages import Digests, Done, Stages
from proto.manifest import digest_file
from train.__main__ import parser as train_parser


class Workshop:
    """Two stages, the second made of the first; counts what is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[str] = []

    def run(self, first: str = "a", *, fails: bool = False, resumes: bool = False) -> Done:
        stages = Stages(self.folder, lambda text: None)

        def make(name: str, text: str) -> Any:
            def fill(folder: Path) -> Mapping[str, Any]:
                self.made.append(f"{name} over {(folder / 'half').exists()}")
                (folder / "half").write_text("")
                if fails and name == "two":
                    raise RuntimeError
                (folder / "out").write_text(text)
                return {"text": text}

            return fill

        one = stages.run("one", {"given": first}, make("one", first), outputs)
        return stages.run("two", one.outputs, make("two", first * 2), outputs, resumes=resumes)


def outputs(folder: Path) -> Digests:
    return {"out": digest_file(folder / "out")}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_what_is_there_is_not_made_again(workshop: Workshop) -> None:
    first, again = workshop.run(), workshop.run()
    assert first == again
    assert first.facts == {"text": "aa"}
    assert (first.folder / "out").read_text() == "aa"
    assert workshop.made == ["one over False", "two over False"]


def test_other_inputs_make_it_and_what_follows_again(workshop: Workshop) -> None:
    workshop.run("a")
    assert (workshop.run("b").folder / "out").read_text() == "bb"
    assert len(workshop.made) == 4


def test_what_was_changed_is_made_again(workshop: Workshop) -> None:
    done = workshop.run()
    (done.folder / "out").write_text("else")
    workshop.run()
    assert workshop.made == ["one over False", "two over False", "two over False"]
    (workshop.folder / "01-one" / "out").unlink()
    assert (workshop.run().folder / "out").read_text() == "aa"
    assert workshop.made[3:] == ["one over False"]  # and it is what it was, so the second one stays


@pytest.mark.parametrize("resumes", [True, False])
def test_a_failed_stage_begins_anew_or_goes_on(workshop: Workshop, resumes: bool) -> None:
    with pytest.raises(RuntimeError):
        workshop.run(fails=True, resumes=resumes)
    assert not (workshop.folder / "02-two").exists()
    workshop.run(resumes=resumes)
    assert workshop.made == ["one over False", "two over False", f"two over {resumes}"]


def test_a_stage_goes_on_only_with_the_same_inputs(workshop: Workshop) -> None:
    with pytest.raises(RuntimeError):
        workshop.run("a", fails=True, resumes=True)
    workshop.run("b", resumes=True)
    assert workshop.made[-1] == "two over False"


def test_the_committed_policy_is_sound() -> None:
    policy = read_policy(DEFAULT)
    assert policy.shape == "chat"
    words = ["run", "checkpoint", "--data", "x", "-o", "y", *command_line(policy.finetune)]
    assert train_parser("run").parse_args(words).adapter == "lora"


def test_flags_are_written_as_the_commands_read_them() -> None:
    assert command_line({"epochs": 2.0, "force": True, "keep_daily": False, "stop": ["a", "b"]}) == [
        *["--epochs", "2.0", "--force", "--no-keep-daily", "--stop", "a", "b"]
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("least_examples = 50", "missing required field `least_examples`"),
        ("share = 0.1", "missing required field `share`"),
        ('objective = "sft"', "objective = None"),
        ("safety_tokens = 64", "safety_tokens"),
        ("approval_loss = 0.05", "missing required field `approval_loss`"),
        ('undecided = "reject"', "missing required field `undecided`"),
    ],
)
def test_a_policy_must_say_everything(change: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(DEFAULT.read_text().replace(change, ""))
    with pytest.raises(DeployError, match=message):
        read_policy(tmp_path / "policy.toml")
