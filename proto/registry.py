"""The registry's files: which version is served, which one is on trial, and who moved them and why. Version 1.

`ROOT/versions/DIGEST/` are artifacts, named by the digest of their manifest and never changed. `ROOT/current`,
`ROOT/candidate` and `ROOT/previous` are pointers, each replaced as a whole; one that is not set has no file.
`ROOT/history.jsonl` holds one line for each movement. `deploy` writes all of this, the server only reads. Pointers
are replaced one by one: while a candidate is promoted, both `current` and `candidate` point to it for a moment.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from proto.records import Created, Digest

VERSIONS = "versions"
HISTORY = "history.jsonl"

Role = Literal["current", "candidate", "previous"]
ROLES: tuple[Role, ...] = ("current", "candidate", "previous")
# `canary` puts a version on trial or changes its share; `reject` ends a trial; `rollback` undoes the last `promote`.
Action = Literal["publish", "canary", "promote", "reject", "rollback"]
Share = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(min_length=1)]


class RegistryError(Exception):
    """A registry that cannot be understood, or a movement that cannot be made; the message says why and the cure."""


class _Entry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Pointer(_Entry, frozen=True):
    """What one of ROLES points to, and the movement that put it there."""

    version: Digest
    since: Created
    by: Text
    why: Text
    share: Share = 0.0  # of the traffic, for the candidate alone

    @property
    def folder(self) -> str:
        """Where the artifact lies, below the registry's root."""
        return version_folder(self.version)


class Movement(_Entry, frozen=True):
    """One line of the history."""

    time: Created
    action: Action
    version: Digest  # the one that is acted on; of a rollback, the one that is left
    by: Text
    why: Text
    share: Share = 0.0  # of `canary` alone
    evidence: dict[str, Any] | str | None = None  # figures, or the path of a file that holds them


def version_folder(version: str) -> str:
    return f"{VERSIONS}/{version}"


def encode_pointer(pointer: Pointer) -> bytes:
    return msgspec.json.encode(pointer) + b"\n"


def decode_pointer(data: bytes, role: Role) -> Pointer:
    """Parse and validate the file of `role`. Raises RegistryError that names the field."""
    return _decode(data, Pointer, role)


def encode_movement(movement: Movement) -> bytes:
    """One line, ended. A line without its end was never written whole."""
    return msgspec.json.encode(movement) + b"\n"


def decode_history(data: bytes) -> list[Movement]:
    """Every whole line; what follows the last line's end was torn as it was written and does not count.

    Raises RegistryError that names line and field.
    """
    lines = data.split(b"\n")[:-1]
    return [_decode(line, Movement, f"{HISTORY}, line {number}") for number, line in enumerate(lines, 1)]


E = TypeVar("E", Pointer, Movement)


def _decode(data: bytes, kind: type[E], name: str) -> E:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RegistryError(
            f"{name} of the registry is not a {kind.__name__.lower()} that this Pawl understands: {error}"
        ) from error
