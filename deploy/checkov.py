"""Checkov's checks of Kubernetes manifests, run by its program: what others have learned to look for.

It pins a hundred libraries, some of ours to other versions, so it has an environment of its own
(`make .checkov/stamp`, from requirements/checkov.txt).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.errors import DeployError

# What is not done here, on purpose.
SKIPPED = {
    "CKV_K8S_11": "no limit on processors: a throttled server misses its deadlines",
    "CKV_K8S_15": "images are pinned, so they need not be pulled again",
    "CKV_K8S_35": "the URL of the records becomes an argument, which a file cannot",
    "CKV_K8S_43": "digests are of one's own registry: render --image pins by them",
}


def problems(program: str, renderings: Mapping[str, str]) -> tuple[int, list[str]]:
    """How many checks passed, and a sentence for each that did not. `renderings`: YAML documents by a name.

    Raises DeployError if the program cannot be run, or could not read what it was given.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, text in renderings.items():
            (Path(folder) / f"{name}.yaml").write_text(text)
        words = [
            program,
            "--framework",
            "kubernetes",
            "--directory",
            folder,
            "--output",
            "json",
            "--compact",
            "--quiet",
        ]
        try:
            done = subprocess.run(
                [*words, "--skip-download", "--skip-check", ",".join(SKIPPED)],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise DeployError(f"--checkov {program} cannot be run: {error}; make .checkov/stamp installs it") from error
    try:
        document: dict[str, Any] = json.loads(done.stdout)
        summary, failed = document["summary"], document["results"]["failed_checks"]
        passed = int(summary["passed"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeployError(f"{program} gave no result: {(done.stderr or done.stdout).strip()[-500:]}") from error
    if summary["parsing_errors"] or not passed:
        raise DeployError(f"{program} could not read {summary['parsing_errors']} of the renderings")
    found: dict[str, list[str]] = {}
    for check in failed:
        told = f"{check['resource']}: {check['check_name']} ({check['check_id']})"
        found.setdefault(told, []).append(Path(check["file_path"]).stem)
    return passed, [f"{told} (in {len(where)}, first {where[0]})" for told, where in found.items()]
