"""A container of the serve image as production runs it: read-only, no capabilities, no new privileges, not root."""

from __future__ import annotations

import re
import socket
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.models.containers import Container

from deploy.errors import DeployError

HTTP, GRPC = 8000, 50051  # in the container, where its network is its own
POLL_SECONDS = 0.05
READ_ONLY = ("/", "/app", "/opt/site", "/model")


@dataclass(slots=True)
class Ports:
    """Where a container listens on this machine; 0 becomes a free port."""

    network: str
    http: int
    grpc: int

    def __post_init__(self) -> None:
        self.http, self.grpc = self.http or free_port(), self.grpc or free_port()

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def hardened(model: Path, ports: Ports, memory_mb: int) -> dict[str, Any]:
    """What `containers.run` takes. The caller adds /data, a volume or a tmpfs."""
    own = ports.network != "host"
    http, grpc = (HTTP, GRPC) if own else (ports.http, ports.grpc)
    command = ["--model", "/model", "--host", "0.0.0.0" if own else "127.0.0.1"]
    command += ["--http-port", str(http), "--grpc-port", str(grpc)]
    settings: dict[str, Any] = {
        "command": [*command, "--records", "/data/records.sqlite", "--derived", "/data"],
        "environment": {"HTTP_PORT": str(http)},
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": 512,
        "mem_limit": f"{memory_mb}m",
        "tmpfs": {"/tmp": "size=64m"},
        "volumes": {str(model.resolve()): {"bind": "/model", "mode": "ro"}},
        "network_mode": ports.network,
    }
    if own:
        published = {HTTP: ports.http, GRPC: ports.grpc}
        settings["ports"] = {f"{inner}/tcp": ("127.0.0.1", outer) for inner, outer in published.items()}
    return settings


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until_ready(container: Container, url: str, limit: float) -> float:
    """The seconds it took. Raises DeployError with the end of the log if it stops, or takes longer than `limit`."""
    began = time.monotonic()
    while not ready(url):
        container.reload()
        if container.status not in ("created", "running"):
            raise DeployError(f"the server ended before it was ready; it said: {tail(container)}")
        if time.monotonic() - began > limit:
            raise DeployError(f"the server is not ready after {limit:g} s; it said: {tail(container)}")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began


def check_confinement(container: Container) -> None:
    """Look from within: no root, no capability, no way to more, system calls filtered, nothing to write to.

    Raises DeployError for what is not so. The image's health check must pass too.
    """
    status = dict(re.findall(r"(\w+):\s*(\S+)", within(container, "cat", "/proc/1/status")))
    wanted = {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    wrong = [
        f"{name} is {status.get(name)}, not {value}" for name, value in wanted.items() if status.get(name) != value
    ]
    if status["Uid"] == "0":
        wrong.append("it runs as root")
    wrong += [f"{folder} can be written" for folder in READ_ONLY if can_write(container, folder)]
    if wrong:
        raise DeployError(f"the container is not confined: {'; '.join(wrong)}")
    within(container, "python3", "/app/serve/health.py")


def can_write(container: Container, folder: str) -> bool:
    return bool(container.exec_run(["touch", f"{folder}/written"]).exit_code == 0)


def within(container: Container, *command: str) -> str:
    """What a command says in the container. Raises DeployError if it fails."""
    status, output = container.exec_run(list(command))
    if status != 0:
        raise DeployError(f"{' '.join(command)} fails in the container: {output.decode(errors='replace').strip()}")
    return str(output.decode())


def tail(container: Any) -> str:
    """The end of its log."""
    log: bytes = container.logs(tail=20)
    return log.decode(errors="replace").strip() or "nothing"
