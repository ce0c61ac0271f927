"""Tokens on disk, mapped into memory: made once for a given data, tokenizer and context, and found again by digest.

A folder holds
- tokens.bin: all sequences one after another, uint16, or uint32 for a vocabulary above 65,536;
- learnt.bin: one byte for each token, 1 where it is learnt; absent if all are;
- offsets.npy [sequences + 1] int64: where each sequence starts in these, and the end;
- examples.npy [examples] (weight float32, target int32), for pairs, thumbs and classes: a pair has two sequences,
  the chosen and the rejected answer, the others one; the target is 1 for thumbs up, or the number of the class;
- store.json: StoreInfo.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from train.data import Kind, SkipReport, Source, find_sources, read
from train.errors import DataError
from train.samples import Sample, SampleMaker, Shape, TooLong

FORMAT_VERSION = 1
INFO = "store.json"
EXAMPLE = np.dtype([("weight", "<f4"), ("target", "<i4")])
SHAPES_OF_EXAMPLES = (Shape.PAIRS, Shape.THUMBS, Shape.CLASSES)


class SourceInfo(msgspec.Struct, frozen=True):
    name: str
    kind: Kind
    num_bytes: int
    sha256: str


class StoreInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a store holds and what it was made of. `num_learnt` counts the tokens that an epoch learns."""

    format_version: int
    digest: str
    shape: Shape
    context: int
    too_long: TooLong
    labels: list[str]
    tokenizer: str
    vocab_size: int
    pad: int
    num_sequences: int
    num_tokens: int
    num_learnt: int
    num_examples: int
    all_learnt: bool
    num_records: int
    skipped: dict[str, int]
    skipped_at: dict[str, list[str]]
    sources: list[SourceInfo]


class TokenStore:
    """A folder that `prepare` has made, opened for reading. Raises DataError if it is not whole."""

    def __init__(self, directory: Path) -> None:
        try:
            self.info = msgspec.json.decode((directory / INFO).read_bytes(), type=StoreInfo)
        except (FileNotFoundError, msgspec.MsgspecError) as error:
            raise DataError(f"{directory} is no token store ({error}); remove it, and it is made again") from error
        info = self.info
        self._tokens = _mapped(directory / "tokens.bin", _token_type(info.vocab_size), info.num_tokens)
        self._learnt = None if info.all_learnt else _mapped(directory / "learnt.bin", np.uint8, info.num_tokens)
        self._offsets: NDArray[np.int64] = np.load(directory / "offsets.npy", mmap_mode="r")
        self.examples: NDArray[np.void] = np.load(directory / "examples.npy")

    def __len__(self) -> int:
        """Sequences."""
        return self.info.num_sequences

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[sequences] of each, in tokens."""
        return np.diff(self._offsets)

    def tokens(self, number: int) -> NDArray[np.int64]:
        """[length] of sequence `number`."""
        return self._tokens[self._offsets[number] : self._offsets[number + 1]].astype(np.int64)

    def learnt(self, number: int) -> NDArray[np.bool_]:
        """[length] of sequence `number`. The first token is never foretold, whatever is said here."""
        start, stop = self._offsets[number], self._offsets[number + 1]
        return np.ones(stop - start, np.bool_) if self._learnt is None else self._learnt[start:stop].astype(np.bool_)


def prepare(
    paths: Sequence[Path],
    shape: Shape,
    tokenizer: Any,
    context: int,
    cache: Path,
    *,
    too_long: TooLong = "skip",
    labels: Sequence[str] = (),
) -> TokenStore:
    """The store of the records of `paths` in the folder `cache`, made if it is not there yet.

    `tokenizer` is a fast one of transformers. `labels` are the names of the classes if they are known; else they are
    those found, sorted. Made in a temporary folder and renamed as the last act, so a store that exists is whole.
    Prints what was skipped. Raises DataError for data that cannot be used.
    """
    report = SkipReport()
    maker = SampleMaker(tokenizer, shape, context, report, too_long=too_long, labels=labels)
    sources = _digest_sources([source for path in paths for source in find_sources(path)])
    num_bytes = sum(source.num_bytes for source in sources)
    tokenizer_digest = digest_tokenizer(tokenizer)
    made_of: list[object] = [FORMAT_VERSION, shape, context, too_long, list(labels), tokenizer_digest]
    made_of += [[source.kind, source.sha256] for source in sources]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    target = cache / f"{shape}-{digest[:16]}"
    if target.exists():
        return TokenStore(target)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=cache) as temporary:
        work = Path(temporary) / "store"
        work.mkdir()
        with tqdm(total=num_bytes, desc="tokenize", unit="B", unit_scale=True, disable=None) as bar:
            writer = _Writer(work, shape, max(tokenizer.get_vocab().values()) + 1, labels)
            writer.write(maker.make(read(paths, report, bar.update)))
        if report.counts:
            print(f"data: {report}", file=sys.stderr)
        if not writer.num_sequences:
            raise DataError(f"no record of {', '.join(map(str, paths))} can be used for {shape}: {report}")
        end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        info = StoreInfo(
            format_version=FORMAT_VERSION,
            digest=digest,
            shape=shape,
            context=context,
            too_long=too_long,
            labels=writer.finish(),
            tokenizer=tokenizer_digest,
            vocab_size=writer.vocab_size,
            pad=end if end is not None else 0,
            num_sequences=writer.num_sequences,
            num_tokens=writer.offsets[-1],
            num_learnt=writer.num_learnt,
            num_examples=len(writer.weights),
            all_learnt=shape in (Shape.TEXT, Shape.CLASSES),
            num_records=report.num_records,
            skipped=report.counts,
            skipped_at=report.places,
            sources=sources,
        )
        (work / INFO).write_bytes(msgspec.json.format(msgspec.json.encode(info)))
        try:
            work.rename(target)
        except OSError:
            if not target.exists():  # else another process was quicker, with the same
                raise
    return TokenStore(target)


def digest_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of all that decides how text becomes tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # set by each call
        backend.pop(setting, None)
    parts = [backend, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class _Writer:
    """Samples into the files of a store, in the order in which they come."""

    def __init__(self, directory: Path, shape: Shape, vocab_size: int, labels: Sequence[str]) -> None:
        self._directory = directory
        self._shape = shape
        self._labels = list(labels)
        self._found: dict[int | str, int] = {}  # labels of classes, numbered as they come
        self.vocab_size = vocab_size
        self.num_learnt = 0
        self.offsets = array("q", [0])
        self.weights = array("f")
        self._targets = array("i")

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    def write(self, samples: Iterable[Sample]) -> None:
        token_type = _token_type(self.vocab_size)
        masked = self._shape not in (Shape.TEXT, Shape.CLASSES)
        with (
            (self._directory / "tokens.bin").open("wb") as tokens,
            (self._directory / "learnt.bin").open("wb") if masked else nullcontext() as learnt,
        ):
            for sample in samples:
                for sequence in sample.sequences:
                    tokens.write(sequence.tokens.astype(token_type).tobytes())
                    self.offsets.append(self.offsets[-1] + len(sequence.tokens))
                    if learnt:
                        learnt.write(sequence.learnt.tobytes())
                    if self._shape != Shape.CLASSES:
                        self.num_learnt += int(sequence.learnt[1:].sum())
                if self._shape in SHAPES_OF_EXAMPLES:
                    self._add_example(sample)

    def finish(self) -> list[str]:
        """Write the tables. The names of the classes."""
        names: list[str] = []
        targets = np.array(self._targets, np.int32)
        if self._shape == Shape.CLASSES:
            names = self._labels or sorted_labels(self._found)
            numbers = {name: number for number, name in enumerate(names)}
            targets = np.array([numbers[str(label)] for label in self._found], np.int32)[targets]
        examples = np.empty(len(self.weights), EXAMPLE)
        examples["weight"], examples["target"] = self.weights, targets
        np.save(self._directory / "examples.npy", examples)
        np.save(self._directory / "offsets.npy", np.array(self.offsets, np.int64))
        return names

    def _add_example(self, sample: Sample) -> None:
        target = sample.target
        if self._shape == Shape.CLASSES:
            target = self._found.setdefault(target, len(self._found))
        self.weights.append(sample.weight)
        self._targets.append(int(target))


def sorted_labels(found: Iterable[int | str]) -> list[str]:
    """Names of classes in a fixed order: integers by value, strings by code point. Raises DataError if mixed."""
    labels = list(found)
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise DataError("labels are integers in some records and strings in others; make them all the same")
    if len(labels) < 2:
        raise DataError(f"all records have the label {labels[0]!r}; to tell classes apart there must be two")
    return [str(label) for label in sorted(labels, key=lambda label: (label if isinstance(label, int) else 0, label))]


def _token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _mapped(path: Path, kind: type[np.generic], length: int) -> NDArray[Any]:
    wanted = length * np.dtype(kind).itemsize
    if not path.is_file() or path.stat().st_size != wanted:
        raise DataError(f"{path} has not the {wanted:,} bytes that it should; remove its folder, and it is made again")
    return np.memmap(path, kind, "r")


def _digest_sources(sources: Sequence[Source]) -> list[SourceInfo]:
    found = []
    num_bytes = sum(source.num_bytes for source in sources)
    with tqdm(total=num_bytes, desc="digest", unit="B", unit_scale=True, disable=None) as bar:
        for source in sources:
            total = hashlib.sha256()
            for file in source.files:
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
            found.append(SourceInfo(source.path.name, source.kind, source.num_bytes, total.hexdigest()))
            bar.update(source.num_bytes)
    return found
