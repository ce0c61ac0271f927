"""Curation from files to folder: what is dropped and why, what is kept as it was, and that all is accounted for."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from train import curate as command
from train import executors
from train.curate import Options, curate
from train.errors import TrainError

NOUNS = """river stone market winter letter captain garden silver morning bridge doctor window forest engine village
paper teacher music island kitchen soldier harbour mountain candle picture shoulder answer question journey people"""
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "How many grains of rice lie on the last square of that board?"
QUICK = Options(filters=("none",), dedup=("none",), redact=("none",))


def prose(seed: int) -> str:
    """English enough for every filter; two seeds have nothing in common."""
    draw = random.Random(seed)
    words = NOUNS.split()
    forms = (
        "The {} carried a {} to that old {}, and nobody at the {} asked why.",
        "When every {} had left, her {} stood beside another {} with some {}.",
        "It was to be his last {} before {} and {} came back from their {}.",
        "Have you seen how this {} follows one {} across any {} or {}?",
        "They painted no {} there, but {} after {} remembered our {} for years.",
    )
    return "\n".join(draw.choice(forms).format(*draw.sample(words, 4)) for _ in range(12))


def write(path: Path, records: list[Any]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def reasons(report: dict[str, Any], step: str) -> dict[str, int]:
    (found,) = (item for item in report["steps"] if item["step"] == step)
    return {reason: tally["count"] for reason, tally in found["reasons"].items()}


def run_quick(tmp_path: Path, records: list[Any], **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    source = write(tmp_path / "in.jsonl", records)
    report = curate([source], tmp_path / "out", replace(QUICK, **changes))
    assert report is not None
    return report, kept(tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Everything at once, in three parts, from three kinds of files."""
    folder = tmp_path_factory.mktemp("whole")
    near = prose(1).replace("nobody", "no one")
    secret = prose(8) + "\nWrite to the captain at ada@example.com or 8.8.8.8 about that."
    write(
        folder / "a.jsonl",
        [
            {"text": prose(0), "source": "a", "score": 1.5},
            {"text": prose(1), "tags": ["x", None]},
            {"text": prose(2) + "  \n"},
            "{broken",
            "[1, 2]",
            {"title": "no text"},
            {"text": "  "},
            {"text": "Too short to learn from, by far."},
            {"text": prose(3) + "\n" + QUESTION},
        ],
    )
    rows = [{"text": near, "rank": 1}, {"text": prose(2).replace(" ", "  "), "rank": 2}, {"text": secret, "rank": 3}]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "b.parquet")
    (folder / "c.txt").write_text(prose(5))
    against = write(folder / "questions.jsonl", [{"question": QUESTION, "answer": "river"}])
    inputs = [folder / name for name in ("a.jsonl", "b.parquet", "c.txt")]
    report = curate(inputs, folder / "out", Options(against=(against,), shards=3))
    assert report is not None
    return folder, report


def test_each_step_drops_what_it_is_for(whole: tuple[Path, dict[str, Any]]) -> None:
    _, report = whole
    assert {step["step"]: step["count"] for step in report["steps"]} == {
        "gopher-quality": 1,
        "gopher-repetition": 0,
        "fineweb": 0,
        "decontamination": 1,
        "exact": 1,
        "minhash": 1,
    }
    assert reasons(report, "gopher-quality") == {"gopher_short_doc": 1}
    assert {reason: tally["count"] for reason, tally in report["unreadable"].items()} == {
        "not JSON": 1,
        "not a JSON object": 1,
        "no column with text": 1,
        "empty text": 1,
    }
    assert report["redacted"] == {"email": 1, "ip": 1}
    assert report["texts_too_short_to_look_for"] == 1


def test_documents_and_characters_are_all_accounted_for(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, report = whole
    for unit in ("documents", "characters"):
        figures = report[unit]
        assert figures["read"] == figures["dropped"] + figures.get("edited", 0) + figures["kept"]
    records = kept(folder / "out")
    assert len(records) == report["documents"]["kept"] == 5
    assert sum(len(record["text"]) for record in records) == report["characters"]["kept"]
    assert report["characters"]["edited"] == len("ada@example.com8.8.8.8") - len("<EMAIL><IP>")


def test_records_keep_their_other_columns(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    records = kept(folder / "out")
    assert {"text": prose(0), "source": "a", "score": 1.5} in records
    assert {"text": prose(5)} in records
    (with_rank,) = (record for record in records if record.get("rank") == 3)
    assert with_rank["text"] == prose(8) + "\nWrite to the captain at <EMAIL> or <IP> about that."


def test_the_report_names_every_file_by_digest_and_shows_examples(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, report = whole
    assert json.loads((folder / "out/report.json").read_text()) == report
    assert [Path(item["path"]).name for item in report["inputs"]] == ["a.jsonl", "b.parquet", "c.txt"]
    files = [*report["inputs"], *report["against"]]
    files += [{**item, "path": folder / "out" / item["path"]} for item in report["outputs"]]
    assert len(files) == 3 + 1 + 3
    for item in files:
        assert item["sha256"] == hashlib.sha256(Path(item["path"]).read_bytes()).hexdigest()
    text = (folder / "out/report.md").read_text()
    assert "too short to be looked for: 1." in text
    assert "`Too short to learn from, by far.`" in text
    assert f"{folder / 'a.jsonl'}:9, has in common: `how many grains" in text
    assert report["options"]["filters"] == ["gopher-quality", "gopher-repetition", "fineweb"]
    assert {path.name for path in (folder / "out").iterdir()} == {
        "00000.jsonl", "00001.jsonl", "00002.jsonl", "report.json", "report.md",
    }  # fmt: skip
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


BULLETS = "\n".join(f"{word} and the {word}" for word in NOUNS.split())


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("gopher-quality", "A word or two.", "gopher_short_doc"),
        ("gopher-quality", prose(1) + " #" * 60, "gopher_too_many_hashes"),
        ("gopher-repetition", "\n".join(["The same line again and again."] * 9), "dup_line_frac"),
        ("c4", prose(1) + "\nIt is { that.", "curly_bracket"),
        ("c4", "One sentence is not enough.", "too_few_sentences"),
        ("fineweb", BULLETS, "line_punct_ratio"),
        ("code", "# This file was generated by make\nx = 1", "code_generated"),
        ("code", "x = 1\n" * 20 + "y = '" + "a" * 1000 + "'", "code_long_line"),
        ("code", "word " * 30, "code_mean_line"),
        ("code", "1, 2, 3\n" * 9, "code_alphabetic"),
    ],
)
def test_filters_by_name(tmp_path: Path, name: str, text: str, reason: str) -> None:
    report, records = run_quick(tmp_path, [{"text": prose(0)}, {"text": text}], filters=(name,))
    assert reasons(report, name) == {reason: 1}
    assert records == [{"text": prose(0)}]


def test_c4_takes_lines_from_text_but_only_judges_chats(tmp_path: Path) -> None:
    ragged = prose(0) + "\nno full stop"
    chat = [{"role": "user", "content": "no full stop"}, {"role": "assistant", "content": prose(0)}]
    report, records = run_quick(tmp_path, [{"text": ragged}, {"messages": chat}], filters=("c4",))
    assert records == [{"text": prose(0)}, {"messages": chat}]
    assert report["characters"]["edited"] == len("\nno full stop")


def test_chats_and_pairs_are_redacted_inside(tmp_path: Path) -> None:
    mail = "ada@example.com"
    parts = [{"type": "text", "text": mail}, {"type": "image", "url": mail}]
    records = [
        {"messages": [{"role": "user", "content": mail, "name": mail}, {"role": "assistant", "content": parts}]},
        {"prompt": mail, "completion": [{"role": "assistant", "content": mail}], "label": True, "id": mail},
        {"prompt": mail, "chosen": "yes " + mail, "rejected": "no"},
    ]
    report, found = run_quick(tmp_path, records, redact=("email",))
    assert found[0]["messages"][0] == {"role": "user", "content": "<EMAIL>", "name": mail}
    assert found[0]["messages"][1]["content"] == [{"type": "text", "text": "<EMAIL>"}, {"type": "image", "url": mail}]
    assert found[1] == {
        "prompt": "<EMAIL>",
        "completion": [{"role": "assistant", "content": "<EMAIL>"}],
        "label": True,
        "id": mail,
    }
    assert (found[2]["chosen"], report["redacted"]) == ("yes <EMAIL>", {"email": 6})


def test_examples_in_the_report_are_cut_and_redacted(tmp_path: Path) -> None:
    records = [{"text": prose(0)}, *({"text": f"Short, from ada@example.com, number {n}"} for n in range(5))]
    report, _ = run_quick(
        tmp_path, records, filters=("gopher-quality",), redact=("email",), examples=2, example_characters=31
    )
    tally = report["steps"][0]["reasons"]["gopher_short_doc"]
    assert (tally["count"], [item["text"] for item in tally["examples"]]) == (5, ["Short, from <EMAIL>, nu"] * 2)


def test_duplicates_are_found_across_parts_and_one_is_kept(tmp_path: Path) -> None:
    texts = [prose(n % 4) + " " * (n // 4) for n in range(12)]
    report, records = run_quick(tmp_path, [{"text": text} for text in texts], dedup=("exact",), shards=5)
    assert reasons(report, "exact") == {"exact": 8}
    assert {record["text"].strip() for record in records} == {prose(n) for n in range(4)}
    assert len(records) == 4


def test_near_duplicates_alone(tmp_path: Path) -> None:
    texts = [prose(0), prose(0).replace("nobody", "no one"), prose(1), "short", "short"]
    report, records = run_quick(tmp_path, [{"text": text} for text in texts], dedup=("minhash",), shards=2)
    assert reasons(report, "minhash") == {"minhash": 1}
    assert len(records) == 4  # texts without a 5-gram are left to exact


@pytest.mark.parametrize("system", [True, False])
def test_decontamination_by_words_in_common(tmp_path: Path, system: bool) -> None:
    role = "system" if system else "user"
    against = write(tmp_path / "eval.jsonl", [{"messages": [{"role": role, "content": QUESTION}]}, {"text": "0 " * 20}])
    texts = [f"{prose(0)}\nHow many GRAINS of rice -- lie on the last square of that board!", prose(1), "7 " * 30]
    report, records = run_quick(tmp_path, [{"text": text} for text in texts], against=(against,))
    assert [record["text"] for record in records] == texts[0 if system else 1 :]
    if not system:
        (example,) = report["steps"][0]["reasons"]["contaminated"]["examples"]
        assert example["match"] == "how many grains of rice lie on the last square of that board"


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    _, records = run_quick(tmp_path, ['{"text": "a", "score": NaN, "more": [Infinity, 1.0]}'])
    assert records == [{"text": "a", "score": None, "more": [None, 1.0]}]


def test_several_processes_make_the_same_bytes_quietly(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": prose(n)} for n in range(6)])
    for name, workers in (("one", "1"), ("two", "2")):
        flags = ["--filters", "gopher-quality", "--dedup", "exact", "minhash", "--shards", "2", "--workers", workers]
        # In a process of its own: what else was imported here (gRPC) has its own words to say about forks.
        command = [sys.executable, "-m", "train", "curate", str(source), "-o", str(tmp_path / name), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    parts = [[path.read_bytes() for path in sorted((tmp_path / name).glob("*.jsonl"))] for name in ("one", "two")]
    assert parts[0] == parts[1]
    assert all(parts[0])


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "short"}])
    with pytest.raises(TrainError, match="none of 1 documents is left, 1 of them for gopher_short_doc"):
        curate([source], tmp_path / "out", replace(QUICK, filters=("gopher-quality",)))
    (tmp_path / "torn.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(TrainError, match=r"torn\.jsonl\.gz"):
        curate([tmp_path / "torn.jsonl.gz"], tmp_path / "out", QUICK)
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainError, match="out exists; remove it"):
        curate([source], tmp_path / "out", QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "torn.jsonl.gz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": ("none", "c4")}, "--filters none c4 is a contradiction"),
        ({"dedup": ("exact", "exact")}, "--dedup exact exact repeats itself"),
        ({"executor": "slurm"}, "needs --slurm-partition"),
    ],
)
def test_flags_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        Options(**changes)


def test_the_command_prints_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": prose(0) + " ada@example.com"}, "{"])
    parser = ArgumentParser()
    command.configure(parser)
    args = parser.parse_args([str(source), "-o", str(tmp_path / "out"), "--filters", "none", "--dedup", "none"])
    assert command.run(args) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["step", "documents", "characters"]
    assert "unreadable: not JSON 1" in out
    assert "redacted: email 1" in out
    assert err == ""  # nothing of datatrove's logs and bars


# -- other executors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("executor", "message"), [("ray", "the package ray"), ("slurm", "the command sbatch")])
def test_a_missing_executor_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    source = write(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(TrainError, match=message):
        curate([source], tmp_path / "out", replace(QUICK, executor=executor, slurm_partition="cpu"))


def test_ray_gets_the_same_stages_and_a_lost_task_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's executor is datatrove's; its tasks are run here by the local one, all but the last stage's."""
    seen = []

    class Fake(executors.LocalPipelineExecutor):  # type: ignore[misc]
        def run(self) -> None:
            seen.append((self.tasks, self.workers))
            if len(seen) < 6:
                super().run()

    monkeypatch.setattr(executors, "RayPipelineExecutor", Fake)
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: True)
    source = write(tmp_path / "in.jsonl", [{"text": prose(0)}])
    options = Options(executor="ray", shards=2, workers=1)
    with pytest.raises(TrainError, match=r"stage write lost tasks \[0, 1\] of 2"):
        curate([source], tmp_path / "out", options)
    assert seen == [(2, 1), (1, 1), (2, 1), (14, 1), (1, 1), (2, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


SBATCH = """#!/bin/sh
for script; do :; done
number=$(ls "$JOBS" | wc -l)
{ echo "$@"; cat "$script"; } > "$JOBS/$(printf %03d "$number")"
if [ -n "$RUN_JOBS" ] && grep -q launch_pickled_pipeline "$script"; then
    SLURM_ARRAY_TASK_ID=0 SLURM_NODELIST=here bash "$script" >&2 || exit 1
fi
echo "Submitted batch job $number"
"""
SRUN = '#!/bin/sh\nshift 3\nexec "$@"\n'


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster of one: sbatch keeps what it gets in this folder and, if asked to, runs it at once."""
    programs, folder = tmp_path / "bin", tmp_path / "jobs"
    folder.mkdir()
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/sh\necho here\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(folder))
    return folder


def test_slurm_gets_each_stage_after_the_one_before(tmp_path: Path, jobs: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": prose(0)}])
    options = Options(executor="slurm", slurm_partition="cpu", slurm_time="01:00:00", workers=4, shards=8)
    assert curate([source], tmp_path / "out", options) is None
    scripts = [path.read_text() for path in sorted(jobs.iterdir())]
    stages = [text for text in scripts if "launch_pickled_pipeline" in text]
    names = ["read", "find-exact", "sign", "match", "cluster", "write", "publish"]
    assert [text.split("--job-name=curate-")[1].split()[0] for text in stages] == names
    assert [text.split("--array=0-")[1].split()[0] for text in stages] == [
        "7%4", "0%4", "7%4", "13%4", "0%4", "7%4", "0%4",
    ]  # fmt: skip
    for before, after in pairwise(stages):
        assert f"--dependency=afterok:{scripts.index(before)}" in after.splitlines()[0]
    for text in stages:
        assert "#SBATCH --partition=cpu\n" in text
        assert "#SBATCH --time=01:00:00\n" in text
        assert f"PYTHONPATH={executors.ROOT}" in text
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_sbatch_is_an_error(tmp_path: Path, jobs: Path) -> None:
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\nexit 3\n")
    source = write(tmp_path / "in.jsonl", [{"text": prose(0)}])
    with pytest.raises(TrainError, match="sbatch ended with 3"):
        curate([source], tmp_path / "out", replace(QUICK, executor="slurm", slurm_partition="nowhere"))
    assert not list(tmp_path.glob(".out-*"))


def test_what_slurm_runs_makes_the_folder(tmp_path: Path, jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_JOBS", "yes")
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", [{"text": prose(0), "n": 1}, {"text": "short"}])
    options = replace(QUICK, filters=("gopher-quality",), executor="slurm", slurm_partition="cpu")
    assert curate([source.relative_to(tmp_path)], Path("out"), options) is None
    assert kept(tmp_path / "out") == [{"text": prose(0), "n": 1}]
    (work,) = tmp_path.glob(".out-*")
    assert [path.name for path in work.iterdir()] == ["logs"]
    shutil.rmtree(work)
