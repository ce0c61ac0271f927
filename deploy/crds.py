"""Custom resources' own schemas, as their projects publish them, without what a validator does not need.

`python -m deploy.crds REPOSITORY COMMIT PATH < CRD` writes the schema of a CustomResourceDefinition into
deploy/kubernetes/schemas: descriptions and defaults go, and what is not named is not allowed, so that a misspelt field
is found. Kubernetes' rules in CEL are not among it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMAS = Path(__file__).parent / "kubernetes/schemas"
Schema = dict[str, Any]
KEPT = (
    *("type", "required", "items", "enum", "pattern", "anyOf", "oneOf", "allOf", "not", "format"),
    *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
)
ANYTHING = "x-kubernetes-preserve-unknown-fields"


def reduce(schema: Schema, *, closed: bool = True) -> Schema:
    """What a JSON Schema validator needs of an openAPIV3Schema; alternatives within (anyOf and so on) stay open."""
    kept: Schema = {name: schema[name] for name in KEPT if name in schema}
    if "properties" in schema:
        kept["properties"] = {name: reduce(inner, closed=closed) for name, inner in schema["properties"].items()}
        if closed and ANYTHING not in schema:
            kept["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = reduce(schema["additionalProperties"], closed=closed)
    if "items" in schema:
        kept["items"] = reduce(schema["items"], closed=closed)
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            kept[name] = [reduce(inner, closed=False) for inner in schema[name]]
    if "not" in schema:
        kept["not"] = reduce(schema["not"], closed=False)
    if schema.get("nullable") and "type" in kept:
        kept["type"] = [kept["type"], "null"]
    return kept


@cache
def validators() -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    """(apiVersion, kind) -> what checks it."""
    found = {}
    for path in sorted(SCHEMAS.glob("*.json")):
        content = json.loads(path.read_text())
        for version, schema in content["versions"].items():
            key = (f"{content['group']}/{version}", content["kind"])
            found[key] = jsonschema.Draft202012Validator(schema)
    return found


def main() -> int:
    repository, commit, path = sys.argv[1:]
    text = sys.stdin.buffer.read()
    spec = yaml.safe_load(text)["spec"]
    content = {
        "source": {
            "repository": repository,
            "commit": commit,
            "path": path,
            "sha256": hashlib.sha256(text).hexdigest(),
        },
        "group": spec["group"],
        "kind": spec["names"]["kind"],
        "versions": {
            version["name"]: reduce(version["schema"]["openAPIV3Schema"])
            for version in spec["versions"]
            if version["storage"]
        },
    }
    SCHEMAS.mkdir(exist_ok=True)
    output = SCHEMAS / f"{spec['names']['plural']}.{spec['group']}.json"
    output.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
