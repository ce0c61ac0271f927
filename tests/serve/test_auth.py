"""API keys: who is let in, for what, under which name, and when the file changes."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import grpc
import pytest
from google.protobuf.struct_pb2 import Value

from proto import inference_pb2 as pb
from proto import inference_pb2_grpc as stubs
from serve.auth import SCOPES, SINGLE, KeyFileError, Keys
from serve.errors import Forbidden, Unauthenticated
from tests.serve.fakes import run, serving
from tests.serve.test_grpc_api import connected
from tests.serve.test_http_api import session

SERVING = (Path(__file__).resolve().parent.parent.parent / "docs/serving.md").read_text()


def table(name: str, key: str, scopes: str = "") -> str:
    return f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n{scopes}\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(table("desk", "d") + table("prometheus", "p", 'scopes = ["metrics"]'))
    return path


def test_a_key_has_a_name_and_scopes(file: Path) -> None:
    keys = Keys("s", file)
    assert [keys.check("Bearer d", scope) for scope in SCOPES] == ["desk"] * len(SCOPES)
    assert keys.check("bearer  s", "generate") == SINGLE
    assert keys.check("Bearer p", "metrics") == "prometheus"
    with pytest.raises(Forbidden, match="'prometheus' is for metrics, not for feedback"):
        keys.check("Bearer p", "feedback")
    for wrong in ("", "Bearer", "Bearer x", "d", "Basic d"):
        with pytest.raises(Unauthenticated):
            keys.check(wrong, "generate")
    assert Keys().check("", "generate") is None
    assert "'d'" not in repr(vars(keys))


def test_the_file_is_read_again_when_it_changes(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(file=file)
    for text, moment in ((table("till", "t"), 1), ("nonsense", 2)):
        file.write_text(text)
        os.utime(file, ns=(moment, moment))
        assert keys.check("Bearer t", "generate") == "till"
        with pytest.raises(Unauthenticated):
            keys.check("Bearer d", "generate")
    assert "the API keys stay as they were" in caplog.text
    file.unlink()
    assert keys.check("Bearer t", "generate") == "till"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no key"),
        ("[desk]", "missing required field `sha256`"),
        ('[desk]\nsha256 = "short"', "sha256"),
        (table("desk", "d", 'scopes = ["all"]'), "all"),
        (table("desk", "d", "scope = 1"), "scope"),
        (table('"a b"', "d"), "matching regex"),
        (table("a", "d") + table("b", "d"), "two names have the same key"),
        ("[", "keys.toml"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=problem):
        Keys(file=path)
    with pytest.raises(KeyFileError, match="No such file"):
        Keys(file=tmp_path / "none")


def test_the_documented_file_is_one(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(re.findall(r"^```toml\n(.*?)^```$", SERVING, re.DOTALL | re.MULTILINE)[0])
    keys = Keys(file=path)
    assert keys.check("Bearer desk", "feedback") == "desk"
    assert keys.check("Bearer prometheus", "metrics") == "prometheus"


def test_both_protocols_go_by_scope_and_store_the_name(file: Path) -> None:
    async def main() -> None:
        async with serving(api_keys=file) as rig, session(rig) as http, connected(rig) as channel:
            for key, path, body, status in (
                ("p", "/metrics", None, 200),
                ("p", "/v1/completions", {"prompt": "x"}, 403),
                ("p", "/v1/feedback", {"inference_id": "x"}, 403),
                ("d", "/v1/completions", {"prompt": "x", "max_tokens": 1}, 200),
            ):
                headers = {"Authorization": f"Bearer {key}"}
                method = "POST" if body else "GET"
                async with http.request(method, path, json=body, headers=headers) as reply:
                    assert reply.status == status
                    answer = await reply.json() if body else {}
                    if status == 403:
                        assert answer["error"]["type"] == "permission_error"
            judgement = {"inference_id": answer["id"], "metric_name": "thumbs", "value": True}
            async with http.post("/feedback", json=judgement, headers={"Authorization": "Bearer d"}) as reply:
                assert reply.status == 200
            api = stubs.InferenceStub(channel)
            call = pb.FeedbackRequest(inference_id=answer["id"], metric_name="thumbs", value=Value(bool_value=False))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.SendFeedback(call, metadata=(("authorization", "Bearer p"),))
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
            await api.SendFeedback(call, metadata=(("authorization", "Bearer d"),))
            assert [feedback.source for feedback in rig.records.judged] == ["desk", "desk"]

    run(main)
