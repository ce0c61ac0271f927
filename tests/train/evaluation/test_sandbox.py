"""The sandbox against what generated code does by mistake, and what it might do to please the checks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from train.errors import TrainError
from train.evaluation.command import sandbox
from train.evaluation.sandbox import Limits, run_checks

CHECK = "assert f(2) == 4"
QUICK = Limits(seconds=1)


@pytest.fixture(params=["here", "limits"])
def any_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is the strongest here, and what is left where the kernel allows no namespaces."""
    if request.param == "limits":
        monkeypatch.setattr(sandbox, "level", lambda: "limits")
    return str(sandbox.level())


def test_what_is_right_passes(any_level: str) -> None:
    assert run_checks("def f(x):\n    return x * x\n", "f", CHECK).passed
    assert run_checks("import math, re, dataclasses\nf = lambda x: math.prod([x, x])\n", "f", CHECK).passed


def test_humanevals_check_takes_the_function() -> None:
    check = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(0) == {}\n"
    assert run_checks("def f(x):\n    return x * x\n", "f", check.format(0)).passed
    outcome = run_checks("def f(x):\n    return x * x\n", "f", check.format(1))
    assert (outcome.verdict, outcome.detail) == ("failed", "AssertionError:  (line 3 of the checks)")


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): return 5",
        "def f(x): return None",
        "def f(x): raise ValueError('no')",
        "def g(x): return 4",
        "f = 4",
        "def f(x",
        # leaving before the checks
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import sys\ndef f(x): sys.exit(0)",
        "import os\ndef f(x): os._exit(0)",
        "raise SystemExit",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise KeyboardInterrupt",
        # patching what the checks rest on
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.isinstance = max\ndef f(x): return 5",
        "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return E(7)",
        "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
        "import __main__\n__main__.check = lambda *_: 'passed'\n__main__.plain = id\ndef f(x): return 5",
        "import sys\nsys.stdout.write('passed')\ndef f(x): return 5",
        "import os\nfor number in (0, 1, 2, 11):\n    os.write(number, b'passed')\ndef f(x): return 5",
        # standard input holds nothing, the checker's memory and files are closed
        "def f(x): return 4 if input() else 5",
        "import sys\ndef f(x): return 4 if sys.stdin.read() else 5",
        "import os\ndef f(x): return 4 if open(f'/proc/{os.getppid()}/mem', 'rb') else 5",
        "import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGKILL); return 5",
        # more than is allowed
        "def f(x): return len(bytearray(10**10)) and 4",
        "def f(x):\n    kept = []\n    while True: kept.append(bytearray(2**24))",
        "import os\ndef f(x):\n    while True: os.fork()",
        "import threading\ndef f(x): threading.Thread(target=print).start(); return 4",
        "def f(x):\n    with open('big', 'w') as file: file.write('x' * 2**22)\n    return 4",
        "def f(x): return f(x)",
        "def f(x): return 4 if 'x' * 2**26 == [].append(1) else list(range(10**8))",
    ],
)
def test_what_is_wrong_never_passes(any_level: str, program: str) -> None:
    outcome = run_checks(program, "f", CHECK, QUICK)
    assert not outcome.passed
    assert outcome.verdict in ("failed", "crashed")


def test_endless_loops_end(any_level: str) -> None:
    assert run_checks("def f(x):\n    while True: pass", "f", CHECK, QUICK).verdict == "timeout"
    sleeping = "import os, time\ndef f(x):\n    os.setsid()\n    time.sleep(1000)"
    assert run_checks(sleeping, "f", CHECK, Limits(wall_seconds=0.7)).verdict == "timeout"


def test_no_process_and_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import os, time\nopen('file', 'w').write('x')\nos.setsid()\ntime.sleep(1000)"
    memory = (512 << 20) + os.getpid()  # by which our processes can be told from other tests'
    assert run_checks(program, "f", CHECK, Limits(wall_seconds=0.7, memory_bytes=memory)).verdict == "timeout"
    deadline = time.monotonic() + 10
    while running(str(memory)):
        assert time.monotonic() < deadline, "a process of the sandbox lives on"
    assert list(tmp_path.iterdir()) == []


def running(argument: str) -> list[Path]:
    """The processes with this argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(path)
    return found


def test_output_of_any_size_goes_nowhere(any_level: str, capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys\ndef f(x): return sys.stderr.write('y' * 2**20) and sys.stdout.write('x' * 2**24) and 4"
    assert run_checks(program, "f", CHECK).passed
    assert capfd.readouterr() == ("", "")


def test_files_can_be_written_in_the_empty_directory_alone() -> None:
    inside = "import os\ndef f(x): return os.listdir(), open('a', 'w').close(), os.listdir()"
    assert run_checks(inside, "f", "assert f(0) == ([], None, ['a'])").passed
    if sandbox.level() != "namespaces":
        return
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        os.chmod(file.name, 0o666)
        writing = f"import os\ndef f(x): return os.open({file.name!r}, os.O_WRONLY) and 4"
        creating = f"def f(x): return open({file.name + '.new'!r}, 'w') and 4"
        removing = f"import os\ndef f(x): return os.remove({file.name!r}) or 4"
        for program in (writing, creating, removing):
            assert "Read-only file system" in run_checks(program, "f", CHECK).detail


def test_there_is_no_environment_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    assert run_checks("import os\ndef f(): return dict(os.environ)", "f", "assert 'SECRET' not in f(), f()").passed
    assert run_checks("import os\ndef f(): return dict(os.environ)", "f", "assert set(f()) <= {'LC_CTYPE'}, f()").passed
    if sandbox.level() == "namespaces":
        program = "import socket\ndef f(x): return socket.create_connection(('127.0.0.1', 1), 1) and 4"
        assert "unreachable" in run_checks(program, "f", CHECK).detail
        mounting = "import ctypes\ndef f(x): return 4 if ctypes.CDLL(None).umount(b'.') == 0 else 5"
        assert not run_checks(mounting, "f", CHECK).passed


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("[{(1, 'a'): {2.5}}, None, True, b'x', 1j, frozenset([1]), float('inf')]",) * 2,
        ("2 ** 4000",) * 2,
    ],
)
def test_plain_data_crosses_as_it_is(value: str, wanted: str) -> None:
    assert run_checks(f"def f(): return {value}", "f", f"assert f() == {wanted}").passed


def test_exceptions_cross_by_name() -> None:
    check = "try:\n    f(1)\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert False"
    assert run_checks("def f(x): raise ValueError('no')", "f", check).passed
    assert not run_checks("def f(x): raise KeyError('no')", "f", check).passed
    assert run_checks("def f(x): raise UnicodeDecodeError('a', b'', 0, 1, 'b')", "f", CHECK).verdict == "failed"


def test_a_machine_without_any_sandbox_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "JAIL", Path(os.devnull))
    with pytest.raises(TrainError, match="no sandbox can be made here"):
        sandbox.level.__wrapped__()


def test_the_jail_imports_nothing_of_ours() -> None:
    """It runs where only the standard library is."""
    source = sandbox.JAIL.read_text()
    done = subprocess.run(["python3", "-I", "-S", "-c", source.replace('"__main__"', '"never"')], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
