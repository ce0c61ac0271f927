"""The images on a real Docker engine: built from the Dockerfile on a local base, run, asked, drained, pushed.

No public image is needed: the base and the tools are made by mmdebstrap, once for this machine, and the libraries are
in the image of the tools, so that nothing is fetched while an image is built.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from deploy.container import free_port
from deploy.render import ROOT
from proto.manifest import load
from tests.serve.tiny import make_artifact

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

IMAGES = Path(tempfile.gettempdir()) / "pawl-images-bookworm"
BASE, TOOLS, SERVE = "pawl-base:test", "pawl-tools:test", "pawl-serve:test"
PACKAGES = {
    "base": "python3,ca-certificates",
    "tools": "python3,python3-pip,g++,binutils,ca-certificates",
    "services": "postgresql,prometheus,prometheus-alertmanager,prometheus-node-exporter",
}
# What the public images of these names do when they start, as far as the compose file relies on it.
POSTGRES = """set -eu
export PATH="/usr/lib/postgresql/15/bin:$PATH" DATA=/var/lib/postgresql/data LANG=C.UTF-8
chown postgres "$DATA" && chmod 700 "$DATA"
as() { su postgres -s /bin/sh -c "$1"; }
if [ ! -f "$DATA/PG_VERSION" ]; then
    (umask 077 && printf %s "$POSTGRES_PASSWORD" > /tmp/password && chown postgres /tmp/password)
    as "initdb -D $DATA -U $POSTGRES_USER --pwfile=/tmp/password --auth-local=trust --auth-host=scram-sha-256"
    echo "host all all all scram-sha-256" >> "$DATA/pg_hba.conf"
    as "echo 'CREATE DATABASE $POSTGRES_DB' | postgres --single -D $DATA postgres"
fi
exec su postgres -s /bin/sh -c "exec postgres -D $DATA -k /tmp -h '*'"
"""
NOBODY = 'FROM pawl-services:test\nRUN mkdir -p /{0} && chown nobody /{0}\nUSER nobody\nENTRYPOINT ["{1}"]\n'
SERVICES = {
    "postgres": 'FROM pawl-services:test\nENV PGHOST=/tmp\nCOPY start.sh /start.sh\nENTRYPOINT ["sh", "/start.sh"]\n',
    "prometheus": NOBODY.format("prometheus", "prometheus"),
    "alertmanager": NOBODY.format("alertmanager", "prometheus-alertmanager"),
    "node_exporter": NOBODY.format("textfile", "prometheus-node-exporter"),
}
OFFLINE = ["--iptables=false", "--bridge=none", "--ip-forward=false", "--ip-masq=false"]
TOOLS_FILE = """FROM pawl-debian:test
COPY . /wheels
ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
"""
Deploy = Callable[..., str]


def run(*words: str, **more: object) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return str(done.stdout)


@pytest.fixture(scope="module")
def debian() -> Path:
    """The archives of two Debian systems, and the server's libraries."""
    IMAGES.mkdir(exist_ok=True)
    for name, packages in PACKAGES.items():
        if not (IMAGES / f"{name}.tar").exists():
            run("mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(IMAGES / "new.tar"))
            (IMAGES / "new.tar").rename(IMAGES / f"{name}.tar")
    wheels = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    run(*wheels, "-d", str(IMAGES / "wheels"), "-r", str(ROOT / "requirements/serve.txt"))
    return IMAGES


@pytest.fixture(scope="module")
def engine(debian: Path) -> Iterator[str]:
    """Its address; $DOCKER_HOST."""
    folder = Path(tempfile.mkdtemp(prefix="pawl-engine-"))
    address = f"unix://{folder}/docker.sock"
    roots = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["dockerd", *roots, *OFFLINE, "-H", address], stderr=log)
    client = docker.DockerClient(base_url=address, timeout=600, version="1.41")
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        client.api.import_image(str(debian / "base.tar"), repository="pawl-base", tag="test")
        client.api.import_image(str(debian / "tools.tar"), repository="pawl-debian", tag="test")
        (debian / "wheels/Dockerfile").write_text(TOOLS_FILE)
        client.images.build(path=str(debian / "wheels"), tag=TOOLS, rm=True, network_mode="none")
        yield address
    finally:
        client.close()
        process.terminate()
        process.wait(60)
        subprocess.run(["umount", f"{folder}/exec/netns/default"], capture_output=True, check=False)  # it leaves that
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def services(engine: str, debian: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The compose file's variables for images that stand in for the public ones."""
    client = docker.DockerClient(base_url=engine, timeout=600, version="1.41")
    client.api.import_image(str(debian / "services.tar"), repository="pawl-services", tag="test")
    for name, dockerfile in SERVICES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "Dockerfile").write_text(dockerfile)
        (folder / "start.sh").write_text(POSTGRES)
        client.images.build(path=str(folder), tag=f"{name}:test", rm=True, network_mode="none")
    client.close()
    return {f"{name.upper()}_IMAGE": f"{name}:test" for name in SERVICES} | {"PAWL_IMAGE": SERVE}


def answers(address: str) -> bool:
    """By the command, since the SDK leaves sockets open that were refused."""
    return not subprocess.run(["docker", "-H", address, "version"], capture_output=True, check=False).returncode


@pytest.fixture(scope="module")
def deploy(engine: str) -> Deploy:
    def command(*words: str) -> str:
        environment = {**os.environ, "DOCKER_HOST": engine}
        return run(sys.executable, "-m", "deploy", *words, cwd=ROOT, env=environment)

    return command


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    for folder in (root, *root.parents[:1]):
        folder.chmod(0o755)  # the container's user must get to it
    return make_artifact(root)


@pytest.fixture(scope="module")
def built(deploy: Deploy, artifact: Path) -> str:
    words = ["image", "build", SERVE, "--base", BASE, "--tools", TOOLS, "--network", "none", "--model", str(artifact)]
    return deploy(*words)


def test_the_image_is_small_and_says_what_it_is(built: str, engine: str, artifact: Path) -> None:
    assert "come on top of the base" in built
    client = docker.DockerClient(base_url=engine)
    labels = client.images.get(SERVE).labels
    client.close()
    assert labels["pawl.model.digest"] == f"sha256:{load(artifact).digest}"
    assert labels["org.opencontainers.image.revision"] != "unknown"


def test_it_runs_confined_and_drains(built: str, deploy: Deploy, artifact: Path) -> None:
    words = ["--base", BASE, "--network", "host", "--streams", "2", "--tokens", "230", "--memory-mb", "1024"]
    said = deploy("image", "verify", SERVE, "--model", str(artifact), *words)
    assert "not root, no capabilities" in said
    assert "2 requests in flight: all finished" in said


def test_a_model_is_an_image_and_is_pushed(deploy: Deploy, artifact: Path, tmp_path: Path) -> None:
    port = free_port()
    configuration = tmp_path / "registry.yml"
    configuration.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path / 'pushed'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (tmp_path / "log").open("w") as log:
        registry = subprocess.Popen(["docker-registry", "serve", str(configuration)], stdout=log, stderr=log)
    try:
        tag = f"127.0.0.1:{port}/pawl-model:1"
        deploy("image", "build", tag, "--target", "model", "--model", str(artifact))
        said = deploy("image", "push", tag)
        assert said.startswith(f"127.0.0.1:{port}/pawl-model@sha256:")
    finally:
        registry.terminate()
        registry.wait(30)


class Compose:
    """The compose file as it stands, but for images and ports."""

    def __init__(self, engine: str, images: dict[str, str], artifact: Path, textfile: Path) -> None:
        self.ports = {name: free_port() for name in ("HTTP_PORT", "GRPC_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT")}
        given = {
            "DOCKER_HOST": engine,
            "MODEL": str(artifact),
            "TEXTFILE": str(textfile),
            "POSTGRES_PASSWORD": "secret",
        }
        given |= {name: str(port) for name, port in self.ports.items()}
        self._environment = {**os.environ, **images, **given, "GRAFANA_PASSWORD": "secret"}

    def __call__(self, *words: str) -> str:
        files = ["-f", "deploy/compose.yaml", "--project-directory", ".", "--project-name", "pawltest"]
        return run("docker-compose", *files, *words, cwd=ROOT, env=self._environment)

    def get(self, port: str, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        url, headers = f"http://127.0.0.1:{self.ports['HTTP_PORT']}{path}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60
        ) as answer:
            return json.load(answer)

    def until(self, found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                if found():
                    return
            assert time.monotonic() < deadline, self("logs", "--tail", "20")
            time.sleep(0.2)


def test_the_compose_file_comes_up(
    built: str, services: dict[str, str], engine: str, artifact: Path, tmp_path: Path
) -> None:
    """All of it but Grafana, which Debian does not have."""
    (tmp_path / "textfile").mkdir()
    (tmp_path / "textfile" / "loop.prom").write_text("pawl_test_gauge 7\n")
    for folder in (tmp_path, *tmp_path.parents[:1]):
        folder.chmod(0o755)
    compose = Compose(engine, services, artifact, tmp_path / "textfile")
    names = ["server", "postgres", "prometheus", "alertmanager", "node-exporter"]
    try:
        compose("up", "--detach", *names)
        compose.until(lambda: bool(compose.get("HTTP_PORT", "/v1/models")["data"]))
        answer = compose.post("/v1/completions", {"prompt": "one two", "max_tokens": 4})
        stored = compose.post("/v1/feedback", {"inference_id": answer["id"], "metric_name": "thumbs", "value": True})
        query = f"SELECT count(*) FROM feedback WHERE id = '{stored['feedback_id']}'"
        assert compose("exec", "-T", "postgres", "psql", "-U", "pawl", "-d", "pawl", "-tAc", query).strip() == "1"

        def value(metric: str) -> list[str]:
            found = compose.get("PROMETHEUS_PORT", f"/api/v1/query?query={metric}")["data"]["result"]
            return sorted(each["value"][1] for each in found)

        compose.until(lambda: value("up") == ["1", "1"])
        compose.until(lambda: value("pawl_test_gauge") == ["7"])
        rules = compose.get("PROMETHEUS_PORT", "/api/v1/rules")["data"]["groups"]
        assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
        assert compose.get("PROMETHEUS_PORT", "/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
        assert compose.get("ALERTMANAGER_PORT", "/api/v2/status")["config"]["original"]
        compose("stop")
        client = docker.DockerClient(base_url=engine, version="1.41")
        ended = {
            c.labels["com.docker.compose.service"]: c.attrs["State"]["ExitCode"]
            for c in client.containers.list(all=True)
        }
        client.close()
        assert [ended[name] for name in ("server", "prometheus", "alertmanager")] == [0, 0, 0]
    finally:
        compose("down", "--volumes", "--timeout", "10")
