"""`python -m serve --model DIR` or `--registry ROOT`, and `python -m serve records COMMAND`."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from proto.manifest import ManifestError
from proto.registry import RegistryError
from serve.logs import start_log
from serve.registry import load_first
from serve.settings import parse_settings


def main() -> int:
    if sys.argv[1:2] == ["records"]:
        from serve.records_command import main as records

        return records(sys.argv[2:])
    began = time.monotonic()
    settings = parse_settings()
    start_log(settings.log_format)
    with ThreadPoolExecutor(1) as pool:
        # Checking the digests and importing the rest take half a second each; hashing needs no interpreter lock.
        verified = pool.submit(load_first, settings)
        import uvloop

        from serve.auth import KeyFileError
        from serve.choices import SettingsError
        from serve.server import run
        from serve.store import StoreError
    try:
        return uvloop.run(run(settings, *verified.result(), began))
    except (ManifestError, RegistryError, SettingsError, KeyFileError, StoreError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
