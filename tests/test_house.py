"""The walls of DESIGN.md, read off the source: who imports whom, names, sizes, pins."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("proto", "train", "compress", "serve", "deploy", "monitoring", "bench")
GENERATED = {"inference_pb2.py", "inference_pb2_grpc.py"}
MAX_LINES = 300
REQUIREMENTS = ("serve", "build", "base-model", "train", "deploy", "dev")

# DESIGN.md's table. Of serve, compress may import the runners and what it takes to give it a plan of tokens: the gate
# judges what will be served.
DEVICE = ("device_runner", "device_session", "device_stream")
RUNNERS = ("runner", "native_runner", *DEVICE, "native", "block_cache", "plan")
MAY_IMPORT = {
    "proto": set(),
    "train": {"proto"},
    "compress": {"proto", "train", *(f"serve.{name}" for name in RUNNERS), "serve.tokenizer", "serve.machine"},
    "serve": {"proto"},
    "deploy": {"proto", "train", "compress", "serve", "monitoring"},
    "monitoring": {"proto"},
    "bench": set(ROOMS),
}
HEAVY = {"torch", "transformers"}
OPTIONAL = {"presidio_analyzer"}  # imported when a flag asks for it, with a message that says what to install


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py")) if path.name not in GENERATED]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file; `from a import b` gives `a.b`, as b may be a module."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else ""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def inside(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def pins(name: str) -> Iterator[str]:
    """The requirement lines of a file, without comments and inclusions."""
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith(("#", "-r ")):
            yield line


def provided_by(*names: str) -> set[str]:
    """The top-level modules that the requirement files bring."""
    wanted = {line.split("==")[0] for name in names for line in pins(name)}
    providers = importlib.metadata.packages_distributions().items()
    return {module for module, found in providers if wanted & {re.sub(r"[-_.]+", "-", x).lower() for x in found}}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_design_allows(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imports(path)
        if name.split(".")[0] in (*ROOMS, "tests") and not inside(name, allowed)
    ]
    assert not wrong


def test_the_server_imports_only_what_serve_txt_installs() -> None:
    allowed = {*sys.stdlib_module_names, *provided_by("serve"), "serve", "proto", *OPTIONAL}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("serve", "proto")
        for name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong


def test_importing_the_server_leaves_torch_out() -> None:
    """Each module in a process of its own: fork one that has loaded nothing of ours, import, look."""
    modules = [module_name(path) for path in sources("serve") if path.stem != "__main__"]
    program = f"""
import importlib, os, sys
for name in {modules!r}:
    if (child := os.fork()) == 0:
        importlib.import_module(name)
        os._exit(bool({HEAVY!r} & sys.modules.keys()))
    if os.waitpid(child, 0)[1]:
        print(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "", "")


def test_no_module_is_named_like_another() -> None:
    """`queue.py` would be ours on one path and Python's on another. The rooms themselves are run from the root."""
    taken = {*sys.stdlib_module_names, *provided_by(*REQUIREMENTS)} - {"__main__"}
    assert [str(path) for path in sources(*ROOMS) if path.stem in taken] == []
    assert set(ROOMS) & set(sys.stdlib_module_names) == set()


def test_no_file_is_too_long() -> None:
    long = {str(path): lines for path in sources(*ROOMS) if (lines := path.read_text().count("\n")) > MAX_LINES}
    assert long == {}


def test_every_code_folder_is_a_package() -> None:
    folders = {path.parent for path in sources(*ROOMS)}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", [*REQUIREMENTS, "checkov", "gpu"])
def test_requirements_are_pinned(name: str) -> None:
    lines = list(pins(name))
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.!]+", line)] == []


def test_the_requirements_are_what_is_installed() -> None:
    found = {
        line.split("==")[0]: line.split("==")[1]
        for name in REQUIREMENTS
        if name != "base-model"  # whose code is never run
        for line in pins(name)
    }
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in found}
    assert installed == found


def test_the_servers_onnxruntime_is_the_same_on_gpus() -> None:
    (plain,) = (line for line in pins("serve") if line.startswith("onnxruntime=="))
    assert plain.replace("onnxruntime==", "onnxruntime-gpu==") in pins("gpu")


def test_the_server_is_pinned_without_torch() -> None:
    assert HEAVY & {line.split("==")[0] for line in pins("serve")} == set()
