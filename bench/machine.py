"""What a result was measured on and with; a number without it means nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from serve.machine import cpu_quota, processor

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
PACKAGES = ("onnxruntime", "numpy", "tokenizers", "aiohttp", "uvloop")
FOLDERS = re.compile(r"""(?<![\w.])/([^\s/:=,'"]+/)+""")


def describe() -> dict[str, Any]:
    info = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        if value
    }
    flags = set(info.get("flags", "").split())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "cpu": processor(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "threads": cpu_quota()[0],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_average": round(os.getloadavg()[0], 2),  # what else ran as the run began
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def without_folders(text: str) -> str:
    """The names of files only: where things lie on this machine is nobody's business."""
    return FOLDERS.sub("", text)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
