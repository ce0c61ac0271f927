"""The manifests render, pass every check, and each check finds what it is there for."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.check import combinations, problems_of
from deploy.crds import SCHEMAS, reduce
from deploy.errors import DeployError
from deploy.manifests import Manifests
from deploy.render import (
    COMPONENTS,
    DEFAULTS,
    EXTRAS,
    KUBERNETES,
    MODEL_SOURCES,
    OVERLAYS,
    ROOT,
    image,
    problem,
    render,
)

VERSION = "1.37"
DIGEST = "sha256:" + "a" * 64
RULES = {"groups": [{"name": "pawl", "rules": [{"alert": "Down", "expr": "up == 0", "labels": {"severity": "page"}}]}]}
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def monitoring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("monitoring")
    for folder in ("rules", "dashboards"):
        (root / folder).mkdir()
    (root / "rules/alerts.yaml").write_text(yaml.safe_dump(RULES))
    (root / "dashboards/host_view.json").write_text('{"title": "Host"}')
    return root


@pytest.fixture(scope="session")
def everything(monitoring: Path) -> dict[str, str]:
    """Source of the model -> what prod is with every component that fits."""
    cases = [components for overlay, components in combinations(0) if overlay == "prod" and len(components) > 1]
    return {components[0]: render("prod", components, monitoring=monitoring) for components in cases}


def problems(text: str) -> list[str]:
    return problems_of(Manifests(text), VERSION)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_as_it_must_be(overlay: str) -> None:
    assert problems(render(overlay)) == []


def test_all_components_together_are_as_they_must_be(everything: dict[str, str]) -> None:
    assert everything.keys() == set(MODEL_SOURCES)
    assert {name: problems(text) for name, text in everything.items()} == {name: [] for name in MODEL_SOURCES}
    kinds = {document["kind"] for document in Manifests(everything["pvc"]).documents}
    assert kinds >= {"PrometheusRule", "ConfigMap", "Rollout", "ScaledObject", "InferencePool", "HTTPRoute", "CronJob"}


@pytest.mark.system  # some hundred renderings, so beside what takes minutes too
@pytest.mark.timeout(1200)
def test_every_combination_is_as_it_must_be() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "check", "--checkov", ".checkov/bin/checkov"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[0]) == len(list(combinations(2))) > 300
    passed = re.search(r"by (\d+) checks of checkov", done.stdout)
    assert passed
    assert int(passed[1]) > 2000


def test_the_components_are_the_folders() -> None:
    assert {path.name for path in (KUBERNETES / "components").iterdir()} | {"alerts", "dashboards"} == set(COMPONENTS)
    assert {path.name for path in (KUBERNETES / "overlays").iterdir()} == set(OVERLAYS)
    used = {name for _, components in combinations(1) for name in components}
    assert used == {*COMPONENTS, *DEFAULTS}
    assert {extra for _, components in combinations(1) if len(components) == 2 for extra in components[1:]} == (
        set(EXTRAS) - {"inference-pool"}
    )


def test_metrics_that_manifests_ask_for_are_the_servers(everything: dict[str, str]) -> None:
    documented = (ROOT / "docs/metrics.md").read_text()
    asked = set(re.findall(r"(?:vllm:|pawl_|http_)\w+", everything["pvc"]))
    asked = {name.removesuffix("_bucket") for name in asked}
    assert len(asked) == 3
    assert [name for name in asked if f"`{name}`" not in documented] == []


# -- what goes together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("components", "why"),
    [
        (("pvc", "helm"), "there is no component helm"),
        (("keda",), "the model comes from none; give one of image-volume, pvc, init-container"),
        (("pvc", "image-volume"), "the model comes from image-volume and pvc"),
        (("image-volume", "retrain-cron"), "retrain-cron needs pvc"),
        (("pvc", "inference-pool"), "inference-pool needs gateway"),
        (("pvc", "retrain-cron", "keda"), ""),
    ],
)
def test_what_does_not_go_together_is_refused(components: tuple[str, ...], why: str) -> None:
    assert problem(components).startswith(why)
    assert bool(problem(components)) == bool(why)


def test_images_are_replaced_and_must_be_pinned() -> None:
    text = render("dev", images=(f"pawl-serve=example.com:5000/team/pawl@{DIGEST}", "pawl-model=example.com/model:3"))
    manifests = Manifests(text)
    (pod,) = manifests.pods
    assert pod.spec["containers"][0]["image"] == f"example.com:5000/team/pawl@{DIGEST}"
    assert [v["image"]["reference"] for v in pod.spec["volumes"] if "image" in v] == ["example.com/model:3"]
    assert problems(text) == []
    for wrong in ("pawl-serve", "pawl-serve=", "pawl-serve=example.com:5000/pawl"):
        with pytest.raises(DeployError, match="pins nothing"):
            image(wrong)
    with pytest.raises(DeployError, match="no overlay staging"):
        render("staging")


# -- each check finds what it is there for --------------------------------------------------------------------------


def server(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


def spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["template"]["spec"]  # type: ignore[no-any-return]


EDITS: list[tuple[str, Edit, str]] = [
    ("Deployment pawl", lambda d: d["spec"].update(replica=2), "'replica' was unexpected"),
    ("ScaledObject pawl", lambda d: d["spec"].update(coolDownPeriod=2), "'coolDownPeriod' was unexpected"),
    ("HTTPRoute pawl", lambda d: d["spec"]["rules"][0].update(backends=[]), "'backends' was unexpected"),
    ("Rollout pawl", lambda d: d["spec"]["strategy"]["canary"].update(stages=[]), "'stages' was unexpected"),
    ("ServiceMonitor pawl", lambda d: d["spec"]["endpoints"][0].update(intervall="1s"), "'intervall' was unexpected"),
    ("PrometheusRule pawl", lambda d: d["spec"]["groups"][0].update(rules=[{"alert": "x"}]), "'expr' is a required"),
    ("Deployment pawl", lambda d: server(d)["args"].append("--drains=5"), "unrecognized arguments: --drains=5"),
    ("Deployment pawl", lambda d: server(d)["args"].append("--slots=many"), "invalid int value: 'many'"),
    ("Deployment pawl", lambda d: server(d)["args"].append("--model-name=$(NAME)"), "no variable NAME"),
    ("CronJob pawl-retrain", lambda d: cron(d)["args"].append("--force"), "unrecognized arguments: --force"),
    ("Job pawl-train-nodes", lambda d: server(d)["args"].append("--nnodes=2"), "unrecognized arguments: --nnodes=2"),
    ("Deployment pawl", lambda d: server(d)["args"].append("--http-port=9000"), "not those of --http-port"),
    ("Deployment pawl", lambda d: server(d)["args"].append("--threads=7"), "but it requests 2 processors"),
    (
        "Deployment pawl",
        lambda d: server(d)["args"].append("--drain-seconds=55"),
        "60 s of grace are not more than 5 s",
    ),
    ("Deployment pawl", lambda d: server(d)["args"].append("--derived=/elsewhere"), "/elsewhere is on no volume"),
    ("Deployment pawl", lambda d: server(d)["livenessProbe"]["httpGet"].update(port="web"), "no port web"),
    ("Deployment pawl", lambda d: server(d)["livenessProbe"]["httpGet"].update(path="/metrics"), "not open to probes"),
    ("Deployment pawl", lambda d: server(d).pop("startupProbe"), "the server needs startupProbe"),
    ("Service pawl-http", lambda d: d["spec"].update(selector={"app": "x"}), "Service pawl-http: selects []"),
    ("Service pawl-http", lambda d: d["spec"]["ports"][0].update(targetPort="web"), "no port web in what it selects"),
    ("PodDisruptionBudget pawl", lambda d: d["spec"]["selector"]["matchLabels"].update(x="y"), "selects no pod"),
    ("InferencePool pawl", lambda d: d["spec"]["targetPorts"][0].update(number=8001), "no port 8001"),
    ("ServiceMonitor pawl", lambda d: d["spec"]["selector"].update(matchLabels={}), "must select one Service"),
    ("NetworkPolicy pawl-server", lambda d: d["spec"]["ingress"][0]["ports"].pop(), "reach its port grpc"),
    ("ScaledObject pawl", lambda d: d["spec"]["scaleTargetRef"].update(name="x"), "there is no Rollout x"),
    ("GRPCRoute pawl", lambda d: d["spec"]["rules"][0]["backendRefs"][0].update(port=1), "no Service pawl-grpc with"),
    ("Rollout pawl", lambda d: d["spec"]["workloadRef"].update(name="x"), "there is no Deployment x"),
    ("AnalysisTemplate pawl", lambda d: d["metadata"].update(name="x"), "there is no AnalysisTemplate pawl"),
    (
        "PersistentVolumeClaim pawl-cycles",
        lambda d: d["metadata"].update(name="x"),
        "PersistentVolumeClaim pawl-cycles",
    ),
    ("ServiceAccount pawl", lambda d: d["metadata"].update(name="x"), "there is no ServiceAccount pawl"),
    ("Deployment pawl", lambda d: server(d).update(image="pawl-serve"), "image pawl-serve is not pinned"),
    ("Deployment pawl", lambda d: server(d).update(image="pawl-serve:latest"), "pawl-serve:latest is not pinned"),
    ("Deployment pawl", lambda d: spec(d)["securityContext"].pop("runAsNonRoot"), "may run as root"),
    ("Deployment pawl", lambda d: spec(d)["securityContext"].pop("seccompProfile"), "system calls are not filtered"),
    ("Deployment pawl", lambda d: spec(d).pop("automountServiceAccountToken"), "gets a token"),
    ("Job pawl-train", lambda d: server(d)["securityContext"].pop("capabilities"), "may get rights"),
    ("Job pawl-train", lambda d: server(d)["securityContext"].pop("readOnlyRootFilesystem"), "may write to its root"),
    ("Job pawl-train", lambda d: server(d)["resources"]["limits"].pop("memory"), "no request and limit of memory"),
    ("Job pawl-train", lambda d: server(d)["resources"]["limits"].update(cpu="4"), "have no limit on them"),
    ("Job pawl-train", lambda d: d["spec"].pop("backoffLimit"), "no limit on tries"),
    ("CronJob pawl-retrain", lambda d: d["spec"].update(concurrencyPolicy="Allow"), "two could run at once"),
]


def cron(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("where", "edit", "said"), EDITS, ids=[f"{where}-{said}" for where, _, said in EDITS])
def test_a_wrong_manifest_is_found(where: str, edit: Edit, said: str, everything: dict[str, str]) -> None:
    manifests = Manifests(everything["pvc"])
    kind, name = where.split()
    documents = copy.deepcopy(manifests.documents)
    (document,) = (d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))
    edit(document)
    assert any(said in text for text in problems(yaml.safe_dump_all(documents)))


def test_a_fixed_number_of_replicas_is_found_where_keda_changes_it(monitoring: Path) -> None:
    documents = Manifests(render("prod", ("pvc", "keda"))).documents
    (deployment,) = (d for d in documents if d["kind"] == "Deployment")
    deployment["spec"]["replicas"] = 3
    assert problems(yaml.safe_dump_all(documents)) == [
        "Deployment pawl: has a number of replicas, which ScaledObject pawl changes"
    ]


# -- the schemas ----------------------------------------------------------------------------------------------------


def test_a_schema_is_reduced_to_what_it_forbids() -> None:
    schema = {
        "description": "words",
        "type": "object",
        "required": ["a"],
        "properties": {
            "a": {"type": "string", "description": "words", "default": "x", "nullable": True},
            "description": {"type": "object", "additionalProperties": {"type": "integer", "example": 1}},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {}},
            "either": {"anyOf": [{"properties": {"b": {"type": "string"}}}]},
        },
    }
    assert reduce(schema) == {
        "type": "object",
        "required": ["a"],
        "additionalProperties": False,
        "properties": {
            "a": {"type": ["string", "null"]},
            "description": {"type": "object", "additionalProperties": {"type": "integer"}},
            "free": {"type": "object", "properties": {}},
            "either": {"anyOf": [{"properties": {"b": {"type": "string"}}}]},
        },
    }


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.name)
def test_a_schema_says_where_it_is_from(path: Path) -> None:
    content = json.loads(path.read_text())
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", content["source"]["repository"])
    assert re.fullmatch(r"[0-9a-f]{40}", content["source"]["commit"])
    assert path.name.endswith(f".{content['group']}.json")
    (schema,) = content["versions"].values()
    assert schema["additionalProperties"] is False
