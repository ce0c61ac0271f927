"""Who may call, and what: bearer keys for both protocols, one or a file of them.

The file is TOML, a table for each key: its name, which feedback is stored with, the key's SHA-256, and its scopes.
It is read again when it changes, so a key is given out or taken back without a restart.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from proto.records import Source
from serve.errors import Forbidden, InvalidRequest, Unauthenticated

log = logging.getLogger("pawl.auth")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
Scope = Literal["generate", "feedback", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SINGLE = "default"  # the name of the key that is given without a file


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    scopes: tuple[Scope, ...] = SCOPES


class KeyFileError(ValueError):
    """The file of keys cannot be read; the message names the file and the field."""


class Keys:
    """Holds the keys' SHA-256 only, so that no dump of this object shows one."""

    def __init__(self, key: str = "", file: Path | None = None) -> None:
        """Without a key and without a file everybody is let in. Raises KeyFileError."""
        self._single = _digest(key) if key else None
        self._file = file
        self._read_at = 0
        self._keys: dict[str, tuple[str, Key]] = {}  # a lookup's time tells of digests, and so of no key
        if file is not None:
            self._keys = read_keys(file)
            self._read_at = file.stat().st_mtime_ns

    def check(self, authorization: str, scope: Scope) -> str | None:
        """The caller's name, None if none is asked for. `authorization` is the header or metadata value, or "".

        Raises Unauthenticated, or Forbidden if the key is not for `scope`.
        """
        if self._single is None and self._file is None:
            return None
        kind, _, given = authorization.partition(" ")
        if kind.lower() != "bearer":
            raise Unauthenticated("this server requires an API key; send the header `Authorization: Bearer KEY`")
        digest = _digest(given.strip())
        if digest == self._single:
            return SINGLE
        self._refresh()
        if digest not in self._keys:
            raise Unauthenticated("the API key is wrong; check the header `Authorization: Bearer KEY`")
        name, key = self._keys[digest]
        if scope not in key.scopes:
            raise Forbidden(f"the API key {name!r} is for {', '.join(key.scopes) or 'nothing'}, not for {scope}")
        return name

    def _refresh(self) -> None:
        """A file that is gone, or wrong, changes nothing but the log: those who could call still can."""
        if self._file is None:
            return
        try:
            changed = self._file.stat().st_mtime_ns
            if changed != self._read_at:
                self._read_at = changed
                self._keys = read_keys(self._file)
                log.info("%s: %d keys", self._file, len(self._keys))
        except (OSError, KeyFileError) as error:
            log.error("the API keys stay as they were: %s", error)


def read_keys(file: Path) -> dict[str, tuple[str, Key]]:
    """Name and key by SHA-256. Raises KeyFileError."""
    try:
        found = msgspec.toml.decode(file.read_bytes(), type=dict[Source, Key])
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{file}: {error}") from error
    keys = {key.sha256: (name, key) for name, key in found.items()}
    if not found:
        raise KeyFileError(f"{file} holds no key; give each a table: [NAME], sha256 = ...")
    if len(keys) < len(found):
        raise KeyFileError(f"{file}: two names have the same key; give each its own")
    return keys


def check_request_id(value: str) -> str:
    """A client's x-request-id, or "" for none. It lands in logs and records, so its characters are limited."""
    if value and not REQUEST_ID.fullmatch(value):
        raise InvalidRequest("x-request-id must be 1 to 128 of A-Z a-z 0-9 . _ : -", param="x-request-id")
    return value


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
