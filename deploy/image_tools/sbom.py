"""A CycloneDX bill of materials, from what is installed: `python3 sbom.py LIBRARIES DPKG_STATUS`.

The standard library alone, since it runs where the image is built. The same contents give the same bytes. CycloneDX
1.6, https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]


def python_packages(folder: Path) -> Iterator[Component]:
    for found in importlib.metadata.distributions(path=[str(folder)]):
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        purl = f"pkg:pypi/{name}@{quote(found.version)}"
        component: Component = {"type": "library", "bom-ref": purl, "name": name, "version": found.version}
        if licence := found.metadata.json.get("license_expression"):
            component["licenses"] = [{"expression": licence}]
        yield component | {"purl": purl}


def debian_packages(status: str) -> Iterator[Component]:
    """From the text of dpkg's status file."""
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") == "install ok installed":
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={fields['Architecture']}"
            yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def bill(components: list[Component]) -> dict[str, Any]:
    """The document; its serial number is of what it lists."""
    listed = sorted(components, key=lambda component: component["bom-ref"])
    serial = uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(component["bom-ref"] for component in listed))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": {"type": "application", "bom-ref": "pawl", "name": "pawl"}},
        "components": listed,
        "dependencies": [{"ref": "pawl", "dependsOn": [component["bom-ref"] for component in listed]}],
    }


def main() -> int:
    folder, status = Path(sys.argv[1]), Path(sys.argv[2])
    print(json.dumps(bill([*python_packages(folder), *debian_packages(status.read_text())]), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
