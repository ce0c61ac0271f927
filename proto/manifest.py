"""The artifact manifest: what a directory must say of itself to be served. Version 1.

An artifact is `model.onnx`, `model.native.onnx` (if all its weights are integers) with their common `model.onnx.data`,
`tokenizer.json`, `chat_template.jinja` (if the model chats), `report.html` (for people) and `manifest.json`. ONNX
Runtime loads a flipped weight bit without a word, so `load` checks every digest, and refuses links and files that the
manifest does not list.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GRAPH = "model.onnx"  # stock operators: runs on any ONNX Runtime
NATIVE_GRAPH = "model.native.onnx"  # our operators (docs/native.md); refers to the same weights
WEIGHTS = "model.onnx.data"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
REPORT = "report.html"  # how it was judged, for people

Count = Annotated[int, Meta(ge=1)]
Form = Literal["native", "stock"]  # which graph runs
KvCacheType = Literal["fp32", "fp16", "bf16", "int8"]
Target = Literal["cpu", "cuda"]  # where the graph is to run
BYTES_OF: Mapping[KvCacheType, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a cached value
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class ManifestError(Exception):
    """The artifact cannot be trusted or understood; the message says which file, what is wrong, and the cure."""


class _Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Architecture(_Part, frozen=True):
    """The numbers that a server needs without opening the graph."""

    family: str
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_size: Count
    hidden_size: Count
    vocab_size: Count
    max_context: Count  # tokens, prompt and completion together
    bos_token_id: int | None = None
    eos_token_ids: list[int] = []


class Precision(_Part, frozen=True, omit_defaults=True):
    """How one product's operands are held: bits of weights and of activations (16 and 32: float)."""

    weight_bits: Literal[4, 8, 16, 32]
    activation_bits: Literal[8, 16, 32]  # 16 beside weights of 8 without groups: integers, before there was rotation
    group: Literal[0, 32, 64, 128] = 0  # neighbouring inputs that share a scale of the weight; 0: a row has one scale
    rotated: bool = False  # the inputs, and the weight's columns, are rotated before they are rounded (docs/native.md)
    bfloat: bool = False  # floats of 16 bits are bfloat16, not float16

    def __post_init__(self) -> None:
        """Raises ValueError if a 4-bit or a weight-only product has no groups, or another one has."""
        needs = self.weight_bits == 4 or (self.weight_bits == 8 and self.activation_bits == 32)
        may = needs or (self.weight_bits == 8 and self.activation_bits == 16)
        if not needs <= (self.group > 0) <= may:
            raise ValueError(
                f"weights of {self.weight_bits} bits beside activations of {self.activation_bits}, with groups of "
                f"{self.group}: 4-bit and weight-only products need groups of 32, 64 or 128, others have none (0)"
            )


class Recipe(_Part, frozen=True):
    """The precision recipe by product; products not listed have `default`."""

    name: str
    default: Precision
    products: dict[str, Precision] = {}


class FileEntry(_Part, frozen=True):
    sha256: Digest
    size_bytes: Annotated[int, Meta(ge=0)]


class Lineage(_Part, frozen=True):
    """Where the artifact came from."""

    checkpoint: Digest
    datasets: dict[str, Digest] = {}
    tools: dict[str, str] = {}
    command: str = ""
    created: str = ""  # ISO 8601, UTC


class Interval(_Part, frozen=True):
    """Where a figure would lie on other text of the same kind, 95 times of 100."""

    low: float
    high: float


class Serving(_Part, frozen=True):
    """What a form took on one machine, as busy as that was: for people, and never judged."""

    decode_milliseconds: float  # a token, of one stream
    tokens_per_second: float  # of all streams together
    streams: Count
    context: Count  # tokens before the first that was timed
    resident_bytes: Annotated[int, Meta(ge=0)]  # of a process that has just served that many streams


class GateReport(_Part, frozen=True):
    """The gate's figures against the full-precision reference on held-out text, and the limits set before the run.

    The metrics without a prefix are those of `form`. Artifacts made before there were intervals have none.
    """

    passed: bool
    forced: bool
    tokens: Count
    metrics: dict[str, float]
    thresholds: dict[str, float]
    form: Form = "stock"
    intervals: dict[str, Interval] = {}
    windows: Annotated[int, Meta(ge=0)] = 0
    machine: str = ""  # that `serving` was measured on
    serving: dict[Form, Serving] = {}


class Manifest(_Part, frozen=True):
    format_version: int
    name: str
    architecture: Architecture
    recipe: Recipe
    kv_cache: KvCacheType
    target: Target
    files: dict[str, FileEntry]
    lineage: Lineage
    gate: GateReport | None = None

    @property
    def digest(self) -> str:
        """The version's name: SHA-256 over the manifest, which itself lists every file's digest."""
        return hashlib.sha256(encode(self)).hexdigest()

    @property
    def kv_bytes_per_token(self) -> int:
        a = self.architecture
        return 2 * a.num_layers * a.num_kv_heads * a.head_size * BYTES_OF[self.kv_cache]


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes: indented, keys in the order of declaration."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)


def decode(data: bytes) -> Manifest:
    """Parse and validate. Raises ManifestError that names the field."""
    try:
        version: Any = msgspec.json.decode(data)["format_version"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ManifestError(f"{MANIFEST} is not a manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{MANIFEST} has format version {version}; this Pawl reads {FORMAT_VERSION}. "
            "Serve it with the Pawl that wrote it, or run `python -m compress quantize` again."
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{MANIFEST}: {error}") from error


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(directory: Path, names: Iterable[str]) -> str:
    """SHA-256 over names and digests: of a checkpoint, of its configuration and its weight files."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name} {digest_file(directory / name)}\n".encode())
    return total.hexdigest()


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Entries for every file of an artifact but the manifest."""
    return {
        path.name: FileEntry(sha256=digest_file(path), size_bytes=path.stat().st_size)
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }


def load(directory: Path) -> Manifest:
    """Read and verify an artifact. Raises ManifestError at the first thing that is wrong.

    Sizes are compared before digests, so that a truncated file is refused at once.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ManifestError(
            f"{directory} is not an artifact: it has no {MANIFEST}. Make one with `python -m compress`."
        )
    manifest = decode(path.read_bytes())
    if {GRAPH, WEIGHTS, TOKENIZER} - manifest.files.keys():
        missing = ", ".join(sorted({GRAPH, WEIGHTS, TOKENIZER} - manifest.files.keys()))
        raise ManifestError(f"{MANIFEST} does not list {missing}")
    with os.scandir(directory) as entries:
        for entry in entries:
            info = entry.stat(follow_symlinks=False)
            if entry.is_symlink() or not entry.is_file() or info.st_nlink != 1:
                raise ManifestError(f"{entry.path} is a link or not a plain file; an artifact holds plain files only")
            if entry.name != MANIFEST and entry.name not in manifest.files:
                raise ManifestError(f"{entry.path} is not listed in {MANIFEST}; remove it")
    for name, expected in manifest.files.items():
        file = directory / name
        if "/" in name or not file.is_file():
            raise ManifestError(f"{file} is listed in {MANIFEST} and missing")
        if file.stat().st_size != expected.size_bytes:
            raise ManifestError(f"{file} has {file.stat().st_size} bytes, not {expected.size_bytes}: truncated?")
    for name, expected in manifest.files.items():
        if (found := digest_file(directory / name)) != expected.sha256:
            raise ManifestError(f"{directory / name} has SHA-256 {found}, not {expected.sha256}: it was changed")
    return manifest
