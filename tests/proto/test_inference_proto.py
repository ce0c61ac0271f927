"""The contract on the wire: the committed stubs are those of the committed proto, and every field is explained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor

from proto import inference_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTO = "proto/inference.proto"
STUBS = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # for protoc-gen-mypy
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, PROTO]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, check=True, capture_output=True)
    for name in STUBS:
        fresh, committed = (tmp_path / "proto" / name).read_text(), (ROOT / "proto" / name).read_text()
        assert fresh == committed, f"proto/{name} is stale: python {' '.join(command[1:4])} ... {PROTO}"


def test_every_field_and_method_has_a_comment() -> None:
    above = ""
    for line in (ROOT / PROTO).read_text().splitlines():
        text = line.strip()
        if line.startswith("  ") and text.endswith((";", "{")):
            assert above.startswith("//"), f"no comment above: {text}"
        above = text


def test_no_integers_that_json_spells_as_strings_but_the_seed() -> None:
    wide = {FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_SINT64}
    found = {
        field.name
        for message in inference_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.type in wide
    }
    assert found == {"seed"}
