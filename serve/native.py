"""The library of native operators (docs/native.md): where it is, or why there is none."""

from __future__ import annotations

from pathlib import Path


class NativeUnavailable(Exception):
    """There is no library for this machine; the message says why, in a few words."""


def library() -> Path:
    """The library to register with ONNX Runtime. Raises NativeUnavailable."""
    raise NativeUnavailable("the native operators are not built")
