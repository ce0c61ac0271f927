"""Rendered manifests, and what is looked up in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

Document = dict[str, Any]
Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Pod:
    """A template of pods: `owner` is what makes them, such as `Deployment pawl`."""

    owner: str
    labels: Labels
    spec: Document

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        """Name -> number."""
        return {port["name"]: port["containerPort"] for c in self.containers for port in c.get("ports", ())}

    def port(self, wanted: str | int) -> bool:
        return wanted in self.ports or wanted in self.ports.values()


class Manifests:
    def __init__(self, text: str) -> None:
        self.documents: list[Document] = list(yaml.load_all(text, yaml.CSafeLoader))
        self.pods = [pod for document in self.documents for pod in pods_of(document)]

    def of(self, *kinds: str) -> Iterator[Document]:
        return (document for document in self.documents if document["kind"] in kinds)

    def names(self, *kinds: str) -> set[str]:
        return {document["metadata"]["name"] for document in self.of(*kinds)}

    def named(self, kind: str, name: str) -> Document | None:
        return next((document for document in self.of(kind) if document["metadata"]["name"] == name), None)

    def select(self, labels: Labels) -> list[Pod]:
        """The pods that have all these labels; all of them for none."""
        return [pod for pod in self.pods if labels.items() <= pod.labels.items()]


def title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def pods_of(document: Document) -> Iterator[Pod]:
    spec = document.get("spec", {})
    if document["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if document["kind"] in ("Deployment", "Job", "CronJob"):
        template = spec["template"]
        yield Pod(title(document), template["metadata"]["labels"], template["spec"])
