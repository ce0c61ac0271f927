"""Builds the stand-in's libraries: every function that the provider asks of CUDA, nearly all of which do nothing."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda.c")
PROVIDER = Path("onnxruntime/capi/libonnxruntime_providers_cuda.so")
HEADERS = Path("nvidia/cu13/include")
RUNTIME = "libcudart.so.13"
UNVERSIONED = "libcuda.so.1"  # whose functions are asked for without a version
# What CUDA's compiler marks its declarations with.
MARKS = ("device_builtin", "device_builtin_texture_type", "device_builtin_surface_type", "cudart_builtin")


def build(site: Path, headers: Path, target: Path) -> None:
    """Libraries in the empty folder `target` for the provider in `site`, with CUDA's headers in `headers`."""
    (target / "crt").mkdir()
    marks = [f"#define __{mark}__" for mark in MARKS]
    marks += ["#define CUDARTAPI", "#define __host__", "#define __device__", "#define __builtin_align__(bytes)"]
    marks += ["#define __align__(bytes)"]
    (target / "crt/host_defines.h").write_text("\n".join(marks))
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", site / PROVIDER], capture_output=True, text=True, check=True
    ).stdout
    wanted: dict[str, list[str]] = defaultdict(list)
    for line in listed.splitlines():
        name, _, version = line.split()[-1].partition("@")
        wanted[version or UNVERSIONED].append(name)
    needed = subprocess.run(["readelf", "-d", site / PROVIDER], capture_output=True, text=True, check=True).stdout
    here = set(re.findall(r"\b(\w+)\([^;]*?\) \{", SOURCE.read_text()))
    for library in re.findall(r"\[(libcu\w*\.so\.\d+)\]", needed):
        names = [name for name in wanted[library] if name.startswith(("cu", "__cuda")) and name not in here]
        lines = [f"long {name}(void) {{ return 0; }}" for name in names]
        own = f'#include "{SOURCE.resolve()}"\n' if library == RUNTIME else ""
        (target / f"{library}.c").write_text(own + "\n".join(lines))
        (target / f"{library}.map").write_text(f"{library} {{ global: *; }};" if library != UNVERSIONED else "{};")
        command = ["gcc", "-w", "-shared", "-fPIC", f"-I{target}", f"-I{headers / HEADERS}", f"-Wl,-soname,{library}"]
        command += [] if library == UNVERSIONED else [f"-Wl,--version-script={target / library}.map"]
        subprocess.run([*command, "-o", target / library, target / f"{library}.c"], check=True)
