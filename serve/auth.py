"""Who may call: one bearer key, compared in constant time, for both protocols."""

from __future__ import annotations

import hashlib
import hmac
import re

from serve.errors import InvalidRequest, Unauthenticated

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class KeyCheck:
    """Holds the key's SHA-256 only, so that no dump of this object shows the key."""

    def __init__(self, key: str) -> None:
        """`key` "" lets everybody in."""
        self._digest = _digest(key) if key else None

    def check(self, authorization: str) -> None:
        """`authorization` is the header or metadata value, "" if there was none. Raises Unauthenticated."""
        if self._digest is None:
            return
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("this server requires an API key; send the header `Authorization: Bearer KEY`")
        if not hmac.compare_digest(_digest(key.strip()), self._digest):
            raise Unauthenticated("the API key is wrong; check the header `Authorization: Bearer KEY`")


def check_request_id(value: str) -> str:
    """A client's x-request-id, or "" for none. It lands in logs and records, so its characters are limited."""
    if value and not REQUEST_ID.fullmatch(value):
        raise InvalidRequest("x-request-id must be 1 to 128 of A-Z a-z 0-9 . _ : -", param="x-request-id")
    return value


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
