"""What checkov says of the manifests: by a stand-in for its program here, by itself in test_kubernetes.py."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.checkov import SKIPPED, problems
from deploy.errors import DeployError

FAILED = {
    "resource": "Deployment.pawl.pawl",
    "check_name": "Not root",
    "check_id": "CKV_K8S_6",
    "file_path": "/prod.yaml",
}


def stand_in(folder: Path, said: str) -> str:
    """A program that notes its arguments and what it was given to read, and says this."""
    path = folder / "checkov"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "files = pathlib.Path(sys.argv[sys.argv.index('--directory') + 1]).iterdir()\n"
        f"note = {{'words': sys.argv[1:], 'files': {{each.name: each.read_text() for each in files}}}}\n"
        f"pathlib.Path({str(folder / 'note.json')!r}).write_text(json.dumps(note))\n"
        f"print({said!r})\n"
        "sys.exit(1)\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def result(passed: int, *failed: dict[str, Any], parsing_errors: int = 0) -> str:
    summary = {"passed": passed, "failed": len(failed), "parsing_errors": parsing_errors}
    return json.dumps({"summary": summary, "results": {"failed_checks": failed}})


def test_each_rendering_is_read_and_what_failed_is_told_once(tmp_path: Path) -> None:
    program = stand_in(tmp_path, result(7, FAILED, FAILED | {"file_path": "/dev.yaml"}))
    passed, told = problems(program, {"prod": "kind: Deployment", "dev": "kind: Service"})
    assert passed == 7
    assert told == ["Deployment.pawl.pawl: Not root (CKV_K8S_6) (in 2, first prod)"]
    note = json.loads((tmp_path / "note.json").read_text())
    assert note["files"] == {"prod.yaml": "kind: Deployment", "dev.yaml": "kind: Service"}
    assert note["words"][note["words"].index("--skip-check") + 1].split(",") == list(SKIPPED)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no module named checkov", "gave no result"),
        ("[]", "gave no result"),
        (result(0), "could not read"),
        (result(5, parsing_errors=1), "could not read 1"),
    ],
)
def test_a_program_that_checks_nothing_is_told(said: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=told):
        problems(stand_in(tmp_path, said), {"prod": "kind: Deployment"})


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"make \.checkov/stamp"):
        problems(str(tmp_path / "missing"), {"prod": "kind: Deployment"})
