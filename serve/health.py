"""The image's health check: is the process alive? By the standard library alone, so that it starts at once."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

SECONDS = 4


def alive(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(not alive(int(os.environ["HTTP_PORT"])))
