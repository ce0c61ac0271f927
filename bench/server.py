"""A server under test as a process of its own: started on a free port, frozen while another is measured, ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.load import HOST, request_bytes
from bench.row import Load

START_SECONDS = 300.0  # vLLM compiles
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02


class ServerError(Exception):
    """The server did not start; the message ends with the last of its output."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """`command` gives the arguments for a port and a folder for scratch files."""

    def __init__(self, name: str, command: Callable[[int, Path], list[str]]) -> None:
        self.name = name
        self.command = command
        self.port = 0
        self.model = ""
        self.startup_seconds = 0.0  # from the command to the first answered request

    def __enter__(self) -> Self:
        self.port = free_port()
        self._scratch = tempfile.TemporaryDirectory(prefix="pawl-bench-")
        folder = Path(self._scratch.name)
        self.arguments = self.command(self.port, folder)
        self._log = folder / "output.txt"
        started = time.monotonic()
        with self._log.open("wb") as output:
            # a group of its own, so that freezing reaches whatever it starts
            self._process = subprocess.Popen(self.arguments, stdout=output, stderr=output, start_new_session=True)
        try:
            self._wait(started + START_SECONDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.startup_seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.thaw()
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # whatever it started and left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self._scratch.cleanup()

    def freeze(self) -> None:
        """Stop it from running at all: an idle server's polling threads would cost the one being measured."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def peak_bytes(self) -> int:
        """The most memory that its processes ever had resident, added up."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, StopIteration):  # ended meanwhile, or a thread of the kernel
                if os.getsid(int(folder.name)) == self._process.pid:
                    lines = (folder / "status").read_text().splitlines()
                    total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        return total

    def _wait(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} exited with {self._process.returncode}: {self.last_output()}")
            try:
                if self._answers():
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(POLL_SECONDS)
        raise ServerError(f"{self.name} did not answer within {START_SECONDS:g} s: {self.last_output()}")

    def _answers(self) -> bool:
        """True once one request was answered; notes the model's name on the way."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=START_SECONDS)
        try:
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            if response.status != 200:
                return False
            self.model = json.loads(response.read())["data"][0]["id"]
            connection.request("POST", "/v1/completions", *_probe(self.model))
            response = connection.getresponse()
            response.read()
            return response.status == 200
        finally:
            connection.close()

    def last_output(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def _probe(model: str) -> tuple[bytes, dict[str, str]]:
    body = request_bytes(Load(4, 1, 1), model, random.Random(0)).partition(b"\r\n\r\n")[2]
    return body, {"Content-Type": "application/json"}
