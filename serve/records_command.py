"""`python -m serve records COMMAND`: look at the records, take them out, delete them. The server may run meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec
from tqdm import tqdm

from proto.lineage import LineageError
from serve import derived
from serve.errors import PawlError
from serve.retention import Retention
from serve.settings import add_flags, parse_flags
from serve.store import Logged, Store, StoreError, open_store

LIMIT = 20


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m serve records", description="Look after interactions and feedback.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Store, argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        add_flags(made, "records")
        return made

    def choose(made: argparse.ArgumentParser) -> None:
        made.add_argument("--since", type=int, default=0, help="begin after this sequence number (default: 0)")
        made.add_argument("--subject", help="only what this subject, the `user` of requests, asked")

    found = command("list", list_records, "one line per interaction: number, date, id, what it was, feedback")
    choose(found)
    found.add_argument("--limit", type=int, default=LIMIT, help="lines to show; 0: all (default: %(default)s)")
    shown = command("show", show, "one interaction with its feedback, as JSON")
    shown.add_argument("id", help="the inference id")
    taken = command("export", export, "interactions with their feedback, as lines of JSON")
    choose(taken)
    taken.add_argument("-o", "--output", type=Path, help="the file to write (default: standard output)")
    gone = command("erase", erase, "delete all of a subject's records, and empty what was made from them")
    gone.add_argument("subject", help="the `user` of the requests")
    add_flags(gone, "derived")
    old = command("expire", expire, "delete what is too old, as the server does every day")
    add_flags(old, "keep_content_days", "keep_metadata_days", "derived")
    return top


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    args = parse_flags(parser(), argv)
    try:
        store = open_store(args.records)
        try:
            args.run(store, args)
        except store.errors as error:
            if isinstance(error, OSError):  # of another file, perhaps
                raise
            raise StoreError(f"{store.name}: {error}") from error
        finally:
            store.close()
    except (StoreError, LineageError, PawlError, OSError) as error:
        print(f"serve records: {error}", file=sys.stderr)
        return 2
    return 0


def list_records(store: Store, args: argparse.Namespace) -> None:
    entries = store.interactions(args.since, args.subject)
    for entry in islice(entries, args.limit or None):
        record = entry.interaction
        said = ", ".join(f"{f.metric_name}: {_short(f.value)}" for f in entry.feedback)
        tokens = f"{record.prompt_tokens}+{record.completion_tokens}"
        fields = (entry.sequence, record.created, record.id, record.endpoint, tokens, record.finish_reason, said)
        print(*fields, sep="\t")


def show(store: Store, args: argparse.Namespace) -> None:
    print(json.dumps(_plain(store.get(args.id)), indent=1, ensure_ascii=False))


def export(store: Store, args: argparse.Namespace) -> None:
    with _output(args.output) as stream:
        for entry in tqdm(store.interactions(args.since, args.subject), unit=" interactions", disable=None):
            stream.write(msgspec.json.encode(_plain(entry)) + b"\n")


def erase(store: Store, args: argparse.Namespace) -> None:
    done = derived.erase(store, args.subject, args.derived)
    print(f"erased {len(done.rows.interactions)} interactions and {len(done.rows.feedback)} feedback")
    for path in done.emptied:
        print(f"emptied {path}; make it again if it is still needed")
    for path in done.versions:
        print(f"{path} was trained on them")
    if done.rows.left:
        print(f"not reached: {done.rows.left}")


def expire(store: Store, args: argparse.Namespace) -> None:
    store.check()
    retention = Retention(args.keep_content_days, args.keep_metadata_days, args.derived)
    print(f"{retention.apply(store)} rows deleted or emptied")


@contextmanager
def _output(path: Path | None) -> Iterator[IO[bytes]]:
    if path is None:
        yield sys.stdout.buffer
        return
    with path.open("xb") as stream:
        path.chmod(0o600)
        yield stream


def _plain(entry: Logged) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(entry)
    return plain


def _short(value: bool | float | str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LIMIT else text[:LIMIT] + '..."'
