"""What runs inside the sandbox: `python -I -S -c THIS_FILE LEVEL MEMORY SECONDS FILE_BYTES UID`. Standard library only.

1. At level "namespaces": new user, mount, process, network and IPC namespaces. Every file is read-only, but for a small
   file system in memory over /tmp, the working directory; there is no network; no process outside can be signalled.
2. Two processes. The worker runs the generated program and calls its function; the checker runs the checks, and no
   generated code runs in it. They exchange plain data (marshal's), so what the program does to builtins, `__eq__`,
   standard output or exit handlers changes no verdict. The worker has no file of the checker's, cannot fork, and cannot
   trace the checker.
3. The job comes on standard input, for the checker alone: program, entry point, checks and a random token. The checker
   prints the token and "passed" if the last check passed, or the token and what went wrong.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import marshal
import os
import resource
import signal
import sys
from types import TracebackType
from typing import Any, BinaryIO

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = (1 << bit for bit in (17, 28, 29, 30, 27))
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
SYS_MOUNT_SETATTR = 442  # on every architecture
CAPABILITIES_V3 = 0x20080522
REQUESTS, ANSWERS, LIBRARY = 10, 11, 12  # descriptors of the worker
MESSAGE = 300  # characters

libc = ctypes.CDLL(None, use_errno=True)


def must(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


def enter_namespaces(file_bytes: int) -> None:
    """After it this process is the first of its process namespace. Raises OSError where the kernel says no."""
    uid, gid = os.getuid(), os.getgid()
    must(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    must(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    at = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), ctypes.sizeof(read_only)
    )
    must(at, "mount_setattr")
    must(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, f"size={file_bytes},nr_inodes=1024,mode=0700".encode()), "mount")
    os.chdir("/tmp")
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)()
    must(libc.capset(ctypes.byref(header), ctypes.byref(none)), "capset")  # or the mounts could be undone


def hold_library() -> None:
    """Reach the standard library through an open directory: it may lie where another user may not go, as in /root."""
    library = os.path.dirname(os.__file__)
    os.dup2(os.open(library, os.O_PATH), LIBRARY)
    packages = [
        module.__path__ for module in sys.modules.values() if isinstance(getattr(module, "__path__", None), list)
    ]
    for paths in (sys.path, *packages):
        paths[:] = [path.replace(library, f"/proc/self/fd/{LIBRARY}") for path in paths]


def plain(value: Any) -> Any:
    """What equals `value` and is of builtin types only; marshal refuses the rest."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for container in (list, tuple, set, frozenset):
        if isinstance(value, container):
            return container(plain(item) for item in value)
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes, bytearray)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    return value


def work(requests: BinaryIO, answers: BinaryIO, limits: tuple[int, int, int]) -> None:
    """Take the program, then calls of its entry point, until the checker goes."""
    memory, seconds, file_bytes = limits
    program, entry_point = marshal.load(requests)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU at the first, SIGKILL at the second
    for number, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(number, (limit, limit))

    def answer(*parts: Any) -> None:
        try:
            data = marshal.dumps(parts)
        except ValueError:
            kinds = ", ".join(type(part).__name__ for part in parts[1:])
            data = marshal.dumps(("raised", "TypeError", f"the checks take plain data, not {kinds}"))
        answers.write(data)
        answers.flush()

    def attempt(call: Any) -> tuple[Any, ...]:
        try:
            return "value", plain(call())
        except BaseException as error:
            return "raised", type(error).__name__, str(error)[:MESSAGE]

    names: dict[str, Any] = {"__name__": "program"}
    loaded = attempt(lambda: exec(compile(program, "<program>", "exec"), names))
    if loaded[0] == "value" and not callable(names.get(entry_point)):
        loaded = "raised", "NameError", f"the program defines no function {entry_point!r}"
    answer(*loaded)
    while True:
        arguments, named = marshal.load(requests)
        answer(*attempt(lambda: names[entry_point](*arguments, **named)))  # noqa: B023


class Crashed(BaseException):
    """The worker is gone."""


def check(job: dict[str, str], requests: BinaryIO, answers: BinaryIO) -> str:
    """Run the checks against the worker; returns "passed" or what went wrong."""

    def receive() -> Any:
        try:
            kind, *parts = marshal.load(answers)
        except (EOFError, ValueError, TypeError) as error:
            raise Crashed from error
        if kind == "value":
            return parts[0]
        error_type = getattr(builtins, parts[0], None)
        if isinstance(error_type, type) and issubclass(error_type, Exception):
            try:
                raised = error_type(parts[1])
            except TypeError:  # such as UnicodeDecodeError, which takes more
                raised = RuntimeError(f"{parts[0]}: {parts[1]}")
            raise raised
        raise RuntimeError(f"{parts[0]}: {parts[1]}")

    def entry_point(*arguments: Any, **named: Any) -> Any:
        marshal.dump((plain(arguments), plain(named)), requests)
        requests.flush()
        return receive()

    try:
        marshal.dump((job["program"], job["entry_point"]), requests)
        requests.flush()
        receive()
        names: dict[str, Any] = {"__name__": "checks", job["entry_point"]: entry_point}
        exec(compile(job["check"], "<check>", "exec"), names)
        if callable(names.get("check")):
            names["check"](entry_point)
    except (Crashed, BrokenPipeError):
        return "crashed"
    except BaseException as error:
        return f"failed {type(error).__name__}: {str(error)[:MESSAGE]}{_line(error.__traceback__)}"
    return "passed"


def _line(trace: TracebackType | None) -> str:
    line = ""
    while trace:
        if trace.tb_frame.f_code.co_filename == "<check>":
            line = f" (line {trace.tb_lineno} of the checks)"
        trace = trace.tb_next
    return line


def main() -> None:
    level, (memory, seconds, file_bytes, uid) = sys.argv[1], map(int, sys.argv[2:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() == 0:  # whom the kernel exempts from the limit on processes
        hold_library()
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        must(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")  # else /proc/self belongs to root
    if level == "namespaces":
        enter_namespaces(file_bytes)
    to_worker, to_checker = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        os.dup2(to_worker[0], REQUESTS)
        os.dup2(to_checker[1], ANSWERS)
        os.closerange(3, REQUESTS)
        try:
            with open(REQUESTS, "rb") as requests, open(ANSWERS, "wb") as answers:
                work(requests, answers, (memory, seconds, file_bytes))
        finally:
            os._exit(0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody of the same user may read the token from our memory
    os.close(to_worker[0])
    os.close(to_checker[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    job = json.load(sys.stdin)
    with open(to_worker[1], "wb") as requests, open(to_checker[0], "rb") as answers:
        verdict = check(job, requests, answers)
        os.kill(worker, signal.SIGKILL)  # one that is dead already keeps its status
        _, status = os.waitpid(worker, 0)
        if verdict == "crashed":
            verdict = "timeout" if os.WTERMSIG(status) == signal.SIGXCPU else f"crashed with status {status}"
        print(job["token"], verdict, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
