"""The images on a real Docker engine: built from the Dockerfile on a local base, run, asked, drained, pushed.

No public image is needed: the base and the tools are made by mmdebstrap, once for this machine, and the libraries are
in the image of the tools, so that nothing is fetched while an image is built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from deploy.container import free_port
from deploy.render import ROOT
from proto.manifest import load
from tests.serve.tiny import make_artifact

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

IMAGES = Path(tempfile.gettempdir()) / "pawl-images-bookworm"
BASE, TOOLS, SERVE = "pawl-base:test", "pawl-tools:test", "pawl-serve:test"
PACKAGES = {"base": "python3,ca-certificates", "tools": "python3,python3-pip,g++,binutils,ca-certificates"}
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
