"""`python -m serve records`, over both databases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.records_command import main
from serve.store import open_store
from tests.serve.stores import feedback, interaction
from tests.serve.test_derived import folder
from tests.serve.test_records import ago


@pytest.fixture
def filled(url: str) -> str:
    store = open_store(url)
    store.append([interaction("chat-1", subject="alice"), interaction("chat-2", subject="bob", created=ago(100))])
    store.append([feedback("chat-1", value="a very long comment on it"), feedback("chat-1", value=0.5)])
    store.close()
    return url


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_list_shows_a_line_each(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--records", filled]) == 0
    first, second = (line.split("\t") for line in said(capsys))
    assert first[2:] == ["chat-1", "chat", "3+1", "stop", 'comment: "a very long comment...", thumbs: 0.5']
    assert second[2] == "chat-2"
    assert main(["list", "--records", filled, "--limit", "1"]) == 0
    assert len(said(capsys)) == 1
    assert main(["list", "--records", filled, "--since", first[0], "--limit", "0"]) == 0
    assert [line.split("\t") for line in said(capsys)] == [second]
    assert main(["list", "--records", filled, "--subject", "alice"]) == 0
    assert [line.split("\t") for line in said(capsys)] == [first]


def test_show_is_json(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "chat-1", "--records", filled]) == 0
    shown = json.loads("\n".join(said(capsys)))
    assert shown["interaction"]["messages"] == [{"role": "user", "content": "hello"}]
    assert [f["value"] for f in shown["feedback"]] == ["a very long comment on it", 0.5]


def test_export_gives_a_subject_its_records(
    filled: str, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = tmp_path / "out.jsonl"
    assert main(["export", "--records", filled, "--subject", "alice", "-o", str(output)]) == 0
    (line,) = map(json.loads, output.read_text().splitlines())
    assert (line["interaction"]["subject"], len(line["feedback"])) == ("alice", 2)
    assert output.stat().st_mode & 0o077 == 0
    assert main(["export", "--records", filled, "-o", str(output)]) == 2  # it is there
    assert main(["export", "--records", filled]) == 0
    assert len(capsysbinary.readouterr().out.splitlines()) == 2


def test_erase_says_what_it_did(filled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "derived"
    digest = folder(root, "dataset", ids=("chat-1",))
    folder(root, "version", kind="version", data=digest)
    assert main(["erase", "alice", "--records", filled, "--derived", str(root)]) == 0
    lines = said(capsys)
    assert lines[0] == "erased 1 interactions and 2 feedback"
    assert lines[1].startswith(f"emptied {root / 'dataset'};")
    assert lines[2] == f"{root / 'version'} was trained on them"
    assert main(["show", "chat-1", "--records", filled]) == 2
    assert "no interaction has the id 'chat-1'" in capsys.readouterr().err


def test_expire_takes_the_servers_limits(filled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = ["--derived", str(tmp_path / "none")]
    assert main(["expire", "--records", filled, *nothing]) == 0  # the text of a hundred days ago
    assert said(capsys) == ["1 rows deleted or emptied"]
    assert main(["expire", "--records", filled, "--keep-metadata-days", "50", *nothing]) == 0
    assert said(capsys) == ["1 rows deleted or emptied"]
    assert main(["expire", "--records", filled, *nothing]) == 0
    assert said(capsys) == ["0 rows deleted or emptied"]


@pytest.mark.parametrize("command", ["list", "show x", "export", "erase x", "expire"])
def test_a_store_that_is_not_there_is_an_error_and_is_not_made(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo.sqlite"
    assert main([*command.split(), "--records", str(path)]) == 2
    assert f"{path} cannot be read" in capsys.readouterr().err
    assert not path.exists()
