"""What a curation does, as stages: filters, decontamination, exact and MinHash de-duplication, redaction.

The order is FineWeb's: what is cheap and drops much first, redaction last, so that marks make no duplicates.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from train.curation_report import Job, describe_file, publish
from train.curation_steps import Read, ReadPart, Redact, WritePart, comparable, quiet
from train.data import Source, find_sources
from train.decontamination import Decontaminate, read_index
from train.executors import Stage
from train.ledger import Ledger
from train.quality import Words, make_filter

if TYPE_CHECKING:
    from train.curate import Options

Step = Callable[..., Any]
HASHES = HashConfig(hash_fc="sha1")  # datatrove's other choice gives xxhash strings, which its version 4 refuses


def make_stages(sources: list[Source], target: Path, work: Path, options: Options) -> tuple[Job, list[Stage]]:
    """The stages, which leave the data in `work`, and the job that `publish` takes when they have run.

    Reads the evaluation files. Raises DataError if they cannot be read.
    """

    def ledger(name: str) -> Ledger:
        cut = options.example_characters
        return Ledger(work / "ledgers", name, examples=options.examples, cut=cut, redacted=options.chosen("redact"))

    job_ledgers = {name: ledger(name) for name in ("read", "unreadable", "redacted", "kept")}
    dropping = [ledger(name) for name in options.chosen("filters")]
    pipeline: list[Step] = [Read(sources, job_ledgers["read"], job_ledgers["unreadable"])]
    pipeline += [make_filter(each.step, each) for each in dropping]
    against = [describe_file(file) for path in options.against for item in find_sources(path) for file in item.files]
    if options.against:
        dropping.append(ledger("decontamination"))
        pipeline.append(Decontaminate(options.against, options.ngram, dropping[-1]))

    shards = options.shards or options.workers
    stages: list[Stage] = []
    if "exact" in options.dedup:
        dropping.append(ledger("exact"))
        before, pipeline = _exact(pipeline, work / "exact", dropping[-1], shards)
        stages += before
    if "minhash" in options.dedup:
        dropping.append(ledger("minhash"))
        before, pipeline = _minhash(pipeline, work / "minhash", dropping[-1], shards)
        stages += before
    if kinds := options.chosen("redact"):
        pipeline.append(Redact(kinds, job_ledgers["redacted"]))
    made = work / "made"
    stages.append(Stage("write", [*pipeline, WritePart(made, job_ledgers["kept"])], shards))

    lineage = {
        "options": {name: _plain(value) for name, value in asdict(options).items()},
        "inputs": [describe_file(file) for source in sources for file in source.files],
        "against": against,
        "texts_too_short_to_look_for": read_index(options.against, options.ngram).too_short,
    }
    return Job(target=target, made=made, steps=tuple(dropping), lineage=lineage, **job_ledgers), stages


class Publish:
    """The last stage where nobody waits for the others to end. Only the logs are left beside the target."""

    def __init__(self, job: Job, work: Path) -> None:
        self.job = job
        self.work = work

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        publish(self.job)
        for path in self.work.iterdir():
            if path.name != "logs":
                shutil.rmtree(path)


def _exact(pipeline: list[Step], folder: Path, ledger: Ledger, shards: int) -> tuple[list[Stage], list[Step]]:
    """The stages before the filter, and the pipeline that starts with it."""
    config = ExactDedupConfig(content_getter=comparable, hash_config=HASHES)
    parts, signatures, found = (str(folder / name) for name in ("parts", "signatures", "found"))
    stages = [
        Stage("read", [*pipeline, WritePart(Path(parts)), ExactDedupSignature(signatures, config)], shards),
        Stage("find-exact", [quiet, ExactFindDedups(signatures, found, config)], 1),
    ]
    return stages, [ReadPart(Path(parts)), ExactDedupFilter(found, config, exclusion_writer=ledger)]


def _minhash(pipeline: list[Step], folder: Path, ledger: Ledger, shards: int) -> tuple[list[Stage], list[Step]]:
    """With datatrove's configuration, FineWeb's: 5-grams, 14 buckets of 8 hashes, alike from about 0.75 on."""
    config = MinhashConfig(hash_config=HASHES)
    parts, signatures, buckets, found = (str(folder / name) for name in ("parts", "signatures", "buckets", "found"))
    sign = MinhashDedupSignature(signatures, config, language=Words())
    stages = [
        Stage("sign", [*pipeline, WritePart(Path(parts)), sign], shards),
        Stage("match", [quiet, MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        Stage("cluster", [quiet, MinhashDedupCluster(buckets, found, config)], 1),
    ]
    return stages, [ReadPart(Path(parts)), MinhashDedupFilter(found, exclusion_writer=ledger)]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
