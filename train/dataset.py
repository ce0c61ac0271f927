"""`python -m train dataset python-stdlib`: a data set from what every interpreter carries, without a network."""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from proto.manifest import digest_file
from train.errors import TrainError
from train.folders import new_folder
from train.stdlib import HELD_OUT_PERCENT, MAX_LINES, MIN_LINES, MIN_WORDS, SALT, Pair, digests, pairs, read_modules
from train.tables import aligned

SOURCES = ("python-stdlib",)
DESCRIPTION = "dataset.json"
SPLIT = (
    f"By module: held out are the top-level packages whose name (without a leading _ or _py), after {SALT!r}, has a "
    f"SHA-256 of which the first 8 bytes, big-endian, are below {HELD_OUT_PERCENT} modulo 100. Held-out pairs whose "
    f"function occurs in a training module, comments, blanks and docstrings aside, are left out."
)
RULE = (
    f"Functions and methods with a docstring whose first paragraph has at least {MIN_WORDS} words; answers of "
    f"{MIN_LINES} to {MAX_LINES} lines, without the docstring, since it is the question; each function once."
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", choices=SOURCES, help="what to make the data set from")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")


def run(args: argparse.Namespace) -> int:
    description = make_dataset(args.output)
    rows = [
        [name, *(f"{item[figure]:,}" for figure in ("records", "characters"))]
        for name, item in description["files"].items()
    ]
    print(aligned(("file", "records", "characters"), rows))
    return 0


def make_dataset(target: Path, library: Path | None = None) -> dict[str, Any]:
    """Write the folder `target` from the sources below `library` (default: the interpreter's own); its description.

    The bytes depend on the sources alone. Raises TrainError if `target` exists or a side of the split stays empty.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    with new_folder(target) as folder:
        modules = list(tqdm(read_modules(library), desc="read", unit=" modules", disable=None))
        sides = {"": [m for m in modules if not m.held_out], ".held-out": [m for m in modules if m.held_out]}
        files: dict[str, dict[str, Any]] = {}
        for side, members in sides.items():
            texts = ({"text": module.text, "module": module.name} for module in members)
            files[f"pretrain{side}.jsonl"] = _write(folder / f"pretrain{side}.jsonl", texts)
        seen: set[str] = set()
        for side, members in sides.items():
            found = [
                pair for module in tqdm(members, desc="pairs", unit=" modules", disable=None) for pair in pairs(module)
            ]
            name = f"instruct{side}.jsonl"
            files[name] = _write(folder / name, (_chat(pair) for pair in _first_of_each(found, seen)))
            seen.update(digest for module in members for digest in digests(module))
        if empty := [name for name, item in files.items() if not item["records"]]:
            raise TrainError(f"{library} gives nothing for {', '.join(empty)}; use an interpreter with its sources")
        description = {
            "source": "python-stdlib",
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "split": SPLIT,
            "pairs": RULE,
            "files": files,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return description


def _first_of_each(found: Iterable[Pair], seen: set[str]) -> Iterable[Pair]:
    for pair in found:
        if pair.digest not in seen:
            seen.add(pair.digest)
            yield pair


def _chat(pair: Pair) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": pair.instruction},
            {"role": "assistant", "content": pair.answer},
        ],
        "module": pair.module,
        "function": pair.function,
    }


def _write(path: Path, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    num_records = num_characters = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            num_records += 1
            texts = [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]
            num_characters += sum(map(len, texts))
    return {"records": num_records, "characters": num_characters, "sha256": digest_file(path)}
