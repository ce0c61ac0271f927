"""The native operators' library: built by the system's compiler, kept by the digest of its sources.

One library holds every instruction set; it chooses when it is loaded. `python -m serve.native` builds it, as `make`
and the image do; the server builds it at its first start if nobody did.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from serve.machine import cpu_quota

SOURCES = Path(__file__).parent / "kernels"
BUILT = SOURCES / "build"
COMPILERS = ("c++", "g++", "clang++")
QUIET = ("-Wno-maybe-uninitialized", "-Wno-uninitialized")  # gcc 12's headers warn about themselves
# No contraction of a * b + c, so that every instruction set rounds alike.
FLAGS = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror", *QUIET)
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
INSTRUCTION_SETS = {
    "amx": (*AVX512, "-mamx-tile", "-mamx-int8", "-DPAWL_AMX"),
    "avx512": AVX512,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx2": AVX2,
}
PER_INSTRUCTION_SET = ("linear.cpp", "attention.cpp", "tokens.cpp")
ONCE = ("operators.cpp",)


class NativeUnavailable(Exception):
    """The native operators cannot be used here; the message says why."""


@cache
def library() -> Path:
    """The library's path, built if it is not there. Raises NativeUnavailable."""
    path = BUILT / f"{digest()}.so"
    if not path.exists():
        print("building the native operators, once: about half a minute", file=sys.stderr, flush=True)
        build(path)
        for old in BUILT.glob("*.so"):
            if old != path:
                old.unlink(missing_ok=True)
    if not instruction_set(path):
        raise NativeUnavailable("this processor has no AVX2")
    return path


def instruction_set(path: Path) -> str:
    """The instruction set that the library at `path` uses here, "" if there is none."""
    function = ctypes.CDLL(str(path)).pawl_instruction_set
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def digest() -> str:
    """Of all sources and flags, so that whatever changes makes a new library."""
    found = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS)).encode())
    for source in sorted(SOURCES.glob("*.*")):
        found.update(source.name.encode() + source.read_bytes())
    return found.hexdigest()[:16]


def build(path: Path) -> None:
    """Build the library at `path`. Raises NativeUnavailable with the compiler's first complaint."""
    compile_and_link(path, (), "-O3", "-fvisibility=hidden", linking=("-shared",))


def compile_and_link(path: Path, more: tuple[Path, ...], *flags: str, linking: tuple[str, ...] = ()) -> None:
    """All sources and `more`, with extra flags, into one file that appears whole. Raises NativeUnavailable."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable("no C++ compiler; install g++")
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as temporary:
            objects = Path(temporary)
            units = [(SOURCES / source, name) for source in PER_INSTRUCTION_SET for name in INSTRUCTION_SETS]
            units += [(source, "") for source in (*(SOURCES / source for source in ONCE), *more)]
            commands = []
            for source, name in units:
                specific = (*INSTRUCTION_SETS.get(name, ()), f"-DPAWL_ISA={name}", f"-I{SOURCES}")
                output = objects / f"{name}-{source.name}.o"
                commands.append([compiler, *FLAGS, *flags, *specific, "-c", str(source), "-o", str(output)])
            with ThreadPoolExecutor(cpu_quota()[0]) as pool:
                list(pool.map(compile_or_raise, commands))
            linked = objects / path.name
            compile_or_raise([compiler, *flags, *linking, *map(str, objects.glob("*.o")), "-o", str(linked)])
            os.replace(linked, path)
    except OSError as error:
        raise NativeUnavailable(f"{error.filename or path} cannot be written: {error.strerror}") from error


def compile_or_raise(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise NativeUnavailable(f"the compiler failed: {complaint}")


def main() -> int:
    try:
        path = library()
    except NativeUnavailable as error:
        print(f"native operators: {error}", file=sys.stderr)
        return 1
    print(f"native operators: {instruction_set(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
