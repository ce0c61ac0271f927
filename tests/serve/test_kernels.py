"""The native operators' kernels: against references and, bit for bit, against each other. See kernels/check.cpp."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import native

CHECK = Path(__file__).parent / "kernels" / "check.cpp"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


def run_check(directory: Path, rounds: int, *flags: str) -> str:
    """Build the check with the kernels and with tiles in plain C++, so that AMX's paths run on any machine."""
    program = directory / "check"
    native.compile_and_link(program, (CHECK,), "-O1", "-DPAWL_EMULATE_TILES", *flags)
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels(tmp_path: Path) -> None:
    output = run_check(tmp_path, 10)
    assert output.endswith("10 rounds, 0 failures\n")
    assert "avx2" in output


@pytest.mark.system
@pytest.mark.timeout(600)  # nearly all of it is the compiler's
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    run_check(tmp_path, 10, *SANITIZERS)


def test_the_library_is_built_once_and_named_by_its_sources() -> None:
    path = native.library()
    assert path.stem == native.digest()
    before = path.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["avx2", "nothing"])
def test_a_lower_instruction_set_can_be_forced(name: str) -> None:
    code = "from serve import native; print(native.instruction_set(native.library()))"
    environment = os.environ | {"PAWL_INSTRUCTION_SET": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if name == "avx2":
        assert done.stdout == "avx2\n"
    else:
        assert "NativeUnavailable" in done.stderr


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NativeUnavailable, match=r"no C\+\+ compiler; install g\+\+"):
        native.build(tmp_path / "library.so")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'fatal error: no space left' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(native.NativeUnavailable, match="no space left"):
        native.build(tmp_path / "library.so")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(native.NativeUnavailable, match="cannot be written"):
        native.build(blocked / "library.so")


def test_the_library_exports_two_functions_alone() -> None:
    loaded = ctypes.CDLL(str(native.library()))
    assert loaded.pawl_instruction_set
    assert loaded.RegisterCustomOps
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", native.library()], capture_output=True, text=True, check=True
    )
    names = {line.split()[2] for line in symbols.stdout.splitlines() if line.split()[1] == "T"}
    assert names == {"pawl_instruction_set", "RegisterCustomOps"}
