"""`python -m serve --model DIR`."""

from __future__ import annotations

import logging
import sys

import uvloop

from proto.manifest import ManifestError
from serve.choices import SettingsError
from serve.server import run
from serve.settings import parse_settings
from serve.store import StoreError


def main() -> int:
    settings = parse_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return uvloop.run(run(settings))
    except (ManifestError, SettingsError, StoreError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
