"""The Dockerfile, what is sent to build it, the report on an image, and the rehearsal of the drain."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest
from docker.utils.build import exclude_paths

from deploy.container import Ports, hardened
from deploy.errors import DeployError
from deploy.image import TARGETS
from deploy.image_build import ROOT, stages_for
from deploy.image_report import SBOM, Chunks, Report, scan
from deploy.image_tools.sbom import bill, debian_packages, python_packages
from serve.settings import parse_settings

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STRICT_VALIDATOR = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
print(error)
sys.exit(error is not None)
"""
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u1

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""


def stages(text: str) -> list[str]:
    return re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE)


# -- the Dockerfile -------------------------------------------------------------------------------------------------


def test_a_target_is_built_from_its_stages_alone() -> None:
    assert stages(stages_for(DOCKERFILE, "serve")) == ["base", "build", "serve"]
    assert stages(stages_for(DOCKERFILE, "serve-gpu")) == ["base", "build", "build-gpu", "serve-gpu"]
    assert stages(stages_for(DOCKERFILE, "train")) == ["base", "build", "build-train", "train"]
    assert stages_for(DOCKERFILE, "serve").startswith(DOCKERFILE.split("\nFROM")[0])
    with pytest.raises(DeployError, match="no target toy; give one of base, build, serve"):
        stages_for(DOCKERFILE, "toy")


def test_the_syntax_is_classic_and_each_target_is_confined() -> None:
    assert "--mount" not in DOCKERFILE
    assert "<<" not in DOCKERFILE
    for target in TARGETS:
        final = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert "USER 65532:65532" in final
        assert "ENV PYTHONPATH=/app:/opt/site" in final
        assert "org.opencontainers.image.revision" in final
        assert re.search(r"^HEALTHCHECK ", final, re.MULTILINE)
        assert not re.search(r"^RUN ", final, re.MULTILINE), "what runs belongs into the build's stage"


def test_what_is_sent_to_the_engine_is_what_is_copied() -> None:
    """All of it, and neither built operators, nor models, nor manifests."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    sent = exclude_paths(str(ROOT), patterns)
    copied = set(re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE))
    own = {"Dockerfile", ".dockerignore"}
    assert {path.split("/")[0] for path in sent} - own == {path.split("/")[0] for path in copied}
    for path in copied:
        assert path in sent
    for path in ("serve/kernels/linear.cpp", "serve/page.html", "proto/inference_pb2.py", "deploy/policy.toml"):
        assert path in sent
    assert [path for path in sent if "kernels/build/" in path or "kubernetes/" in path or path.endswith(".pyc")] == []


def test_the_default_command_is_understood() -> None:
    commands = re.findall(r'^ENTRYPOINT \["python3", "-m", "serve"(.*)\]\nCMD \[(.*)\]$', DOCKERFILE, re.MULTILINE)
    devices = []
    for device, command in commands:
        settings = parse_settings(json.loads(f"[{device.removeprefix(', ')}{', ' if device else ''}{command}]"))
        devices.append(settings.device)
        assert settings.records.startswith("/data/")
        assert settings.http_port == 8000
    assert devices == ["cpu", "cuda"]


# -- the bill of materials ------------------------------------------------------------------------------------------


def test_the_bill_lists_what_is_installed() -> None:
    site = Path(numpy.__file__).parent.parent
    components = [*python_packages(site), *debian_packages(STATUS)]
    document = bill(components)
    purls = [component["purl"] for component in document["components"]]
    assert f"pkg:pypi/numpy@{numpy.__version__}" in purls
    assert "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64" in purls
    assert not any("gone" in purl for purl in purls)
    assert purls == sorted(purls)
    assert len(set(purls)) == len(purls)
    assert bill(components[::-1]) == document
    assert bill(components[1:])["serialNumber"] != document["serialNumber"]


@pytest.mark.system  # the library is one of checkov's, in the environment that only `make test-system` makes
@pytest.mark.parametrize(("change", "told"), [({}, ""), ({"bomFormat": "SPDX"}, "'SPDX'"), ({"parts": []}, "'parts'")])
def test_the_bill_is_as_cyclonedx_wants_it(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    site = Path(numpy.__file__).parent.parent
    document = bill([*python_packages(site), *debian_packages(STATUS)]) | change
    (tmp_path / "sbom.json").write_text(json.dumps(document))
    words = [ROOT / ".checkov/bin/python", "-c", STRICT_VALIDATOR, tmp_path / "sbom.json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[-500:]) == (1 if told else 0, "")
    assert told in done.stdout


# -- the report -----------------------------------------------------------------------------------------------------


def archive(files: dict[str, tuple[int, bytes]]) -> tarfile.TarFile:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as written:
        for name, (mode, data) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            written.addfile(entry, io.BytesIO(data))
    content = whole.getvalue()
    return tarfile.open(fileobj=Chunks(content[at : at + 700] for at in range(0, len(content), 700)), mode="r|")


def test_a_scan_finds_secrets_rights_and_the_bill() -> None:
    folders, suspicious, sbom = scan(
        archive(
            {
                "app/serve/api.py": (0o644, b"1" * 10),
                "app/serve/page.html": (0o644, b"1" * 5),
                "app/tls.key": (0o600, b"secret"),
                "app/anyone.py": (0o666, b""),
                "opt/site/root": (0o4755, b""),
                "usr/bin/su": (0o4755, b"the base's own"),
                SBOM: (0o644, b'{"components": []}'),
            }
        )
    )
    assert folders["app/serve/api.py"] == 10
    assert suspicious == ["/app/tls.key", "/app/anyone.py", "/opt/site/root"]
    assert sbom == b'{"components": []}'


WHOLE = Report(
    tag="pawl-serve:1",
    total_bytes=400_000_000,
    own_bytes=195_000_000,
    user="65532:65532",
    labels={"org.opencontainers.image.title": "pawl-serve", "org.opencontainers.image.revision": "abc"},
    layers=[(5, "COPY")],
    folders={"app": 5},
    suspicious=[],
    sbom=b'{"components": [{"name": "numpy"}]}',
)


def replaced(**changes: Any) -> list[str]:
    return dataclasses.replace(WHOLE, **changes).problems()


def test_an_image_that_is_not_ours_is_told_why() -> None:
    assert WHOLE.problems() == []
    assert "195.0 MB come on top of the base" in WHOLE.text()
    for user in ("", "root", "0", "0:0"):
        assert "must be a number that is not 0" in replaced(user=user)[0]
    assert "which commit" in replaced(labels={})[0]
    assert "no bill of materials" in replaced(sbom=b"")[0]
    assert replaced(suspicious=["/app/tls.key"]) == ["/app/tls.key must not be in an image"]
    assert replaced(sbom=b'{"components": [{"name": "torch"}]}') == ["the server needs no torch"]


# -- the container --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["host", "bridge"])
def test_the_container_is_confined_and_its_command_understood(network: str, tmp_path: Path) -> None:
    ports = Ports(network, 0, 0)
    assert ports.http != ports.grpc
    settings = hardened(tmp_path, ports, 512)
    assert settings["read_only"]
    assert (settings["cap_drop"], settings["security_opt"]) == (["ALL"], ["no-new-privileges"])
    assert settings["volumes"][str(tmp_path)]["mode"] == "ro"
    served = parse_settings(settings["command"])
    assert settings["environment"] == {"HTTP_PORT": str(served.http_port)}
    if network == "host":
        assert (served.host, served.http_port, served.grpc_port) == ("127.0.0.1", ports.http, ports.grpc)
    else:
        assert served.host == "0.0.0.0"
        published = {f"{served.http_port}/tcp": ports.http, f"{served.grpc_port}/tcp": ports.grpc}
        assert settings["ports"] == {inner: ("127.0.0.1", outer) for inner, outer in published.items()}
