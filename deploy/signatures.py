"""Signatures of versions by `model-signing` (OpenSSF): who had the key vouches for every file of the folder.

A signature is a Sigstore bundle over the SHA-256 of each file, made with an elliptic-curve key (NIST P-256, P-384 or
P-521, in PEM). `python -m model_signing verify key` reads it too.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from proto.registry import RegistryError

FOLDER = "signatures"


def signature_file(version: str) -> str:
    return f"{FOLDER}/{version}.sig"


def sign(folder: Path, key: Path) -> bytes:
    """Raises RegistryError if there is no `model-signing`, or the key is none."""
    signing = _module("signing")
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "signature"
        try:
            signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, made)
        except (ValueError, TypeError) as error:
            raise RegistryError(f"{key} cannot sign: {error}") from error
        return made.read_bytes()


def check(folder: Path, signature: bytes | None, public_key: Path) -> None:
    """Raises RegistryError if the folder was not signed as it is now with the key that `public_key` belongs to."""
    verifying = _module("verifying")
    if signature is None:
        raise RegistryError(f"version {folder.name[:12]} is not signed; publish it again with --key")
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "signature"
        made.write_bytes(signature)
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, made)
        except (ValueError, TypeError, KeyError) as error:
            raise RegistryError(f"version {folder.name[:12]} is not signed with {public_key}: {error}") from error


def _module(name: str) -> Any:
    """Imported here, since it takes seconds and few need it."""
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise RegistryError(
            f"signatures need model-signing ({error}); `pip install -r requirements/deploy.txt`"
        ) from error
