"""The drain, rehearsed with a server process in place of a container."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.container import Ports
from deploy.errors import DeployError
from deploy.rehearsal import rehearse
from serve.health import alive
from tests.serve.tiny import Server, make_artifact, start_server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("tiny"))


@dataclass
class Process:
    server: Server

    def kill(self, signal: str) -> None:
        assert signal == "SIGTERM"
        self.server.process.terminate()

    def wait(self, *, timeout: float) -> dict[str, int]:
        status = self.server.process.wait(timeout)
        assert self.server.process.stdout is not None
        self.server.process.stdout.close()
        return {"StatusCode": status}

    def logs(self, *, tail: int) -> bytes:
        return b"said"


def ports_of(server: Server) -> Ports:
    return Ports("host", *(int(url.rpartition(":")[2]) for url in (server.http_url, server.grpc_address)))


def test_a_drain_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    server = start_server(tiny, tmp_path / "records.sqlite")
    ports = ports_of(server)
    assert alive(ports.http)
    done = rehearse(Process(server), ports, 2, 170)
    assert done.finished == 2
    assert done.refused_seconds < done.seconds
    assert "all finished" in done.text()
    assert not alive(ports.http)


def test_a_drain_that_loses_requests_is_told(tiny: Path, tmp_path: Path) -> None:
    server = start_server(tiny, tmp_path / "records.sqlite", "--drain-seconds", "0")
    with pytest.raises(DeployError, match=r"[12] of 2 requests were lost"):
        rehearse(Process(server), ports_of(server), 2, 170)


def test_requests_that_are_refused_are_told(tiny: Path, tmp_path: Path) -> None:
    server = start_server(tiny, tmp_path / "records.sqlite", "--api-key", "secret")
    process = Process(server)
    try:
        with pytest.raises(DeployError, match=r"before the server was told to stop: .*(HTTP 401|UNAUTHENTICATED)"):
            rehearse(process, ports_of(server), 2, 16)
    finally:
        process.kill("SIGTERM")
        assert process.wait(timeout=30)["StatusCode"] == 0
