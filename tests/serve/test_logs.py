"""What the log is given cannot make it lie: one line stays one line, and an object an object."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import aiohttp
import grpc
import pytest

from proto import inference_pb2 as pb
from proto import inference_pb2_grpc as stubs
from serve.logs import JsonFormatter, TextFormatter
from serve.settings import parse_settings
from tests.serve.fakes import FakeEngine, run, serving

FORGED = 'a\nERROR root: "forged"\x1b[31m\x85\u2028\ud800é'


def record(message: str, *args: object, error: Exception | None = None, **extra: str) -> logging.LogRecord:
    info = None
    if error is not None:
        try:
            raise error
        except Exception:
            info = sys.exc_info()
    made = logging.LogRecord("pawl.test", logging.ERROR, "file.py", 1, message, args, info)
    made.__dict__.update(extra)
    return made


def test_text_stays_on_its_line() -> None:
    shown = TextFormatter().format(record("from %s", FORGED))
    assert shown.endswith('ERROR pawl.test: from a\\nERROR root: "forged"\\x1b[31m\\x85\\u2028\\ud800é')
    assert len(shown.splitlines()) == 1
    assert "pawl.test: [r-1] all" in TextFormatter().format(record("all", request_id="r-1"))


def test_a_traceback_is_indented_and_escaped() -> None:
    first, *rest = TextFormatter().format(record("it broke", error=ValueError(FORGED))).split("\n")
    assert first.endswith("it broke")
    assert rest[0] == "\tTraceback (most recent call last):"
    assert all(line.startswith("\t") for line in rest)
    assert "\x1b" not in "".join(rest)


def test_json_is_one_object_a_line() -> None:
    shown = JsonFormatter().format(record("from %s", FORGED, error=ValueError("no"), request_id="r-1"))
    assert shown.isascii()
    assert "\n" not in shown
    told = json.loads(shown)
    assert told.pop("time").endswith("+00:00")
    assert told.pop("traceback").endswith("ValueError: no")
    assert told == {"level": "ERROR", "logger": "pawl.test", "message": f"from {FORGED}", "request_id": "r-1"}


def test_json_leaves_out_what_there_is_not() -> None:
    assert json.loads(JsonFormatter().format(record("up"))).keys() == {"time", "level", "logger", "message"}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the server's loggers say, as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("pawl")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


class Broken(FakeEngine):
    def submit(self, *requests: object) -> None:
        raise RuntimeError("a bug")


def test_failures_tell_the_request_id_of_their_call_alone(lines: io.StringIO) -> None:
    body = {"prompt": "a secret prompt"}

    async def main() -> None:
        async with serving(Broken()) as rig, aiohttp.ClientSession(rig.url) as http:
            for headers in ({"X-Request-Id": "first"}, {}):  # over one connection
                async with http.post("/v1/completions", json=body, headers=headers) as reply:
                    assert reply.status == 500
            async with grpc.aio.insecure_channel(rig.address) as channel:
                call = pb.CompletionRequest(prompt=["a secret prompt"])
                with pytest.raises(grpc.aio.AioRpcError):
                    async for _ in stubs.InferenceStub(channel).Complete(call, metadata=[("x-request-id", "third")]):
                        pass

    run(main)
    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [entry.get("request_id", "") for entry in told] == ["first", "", "third"]
    assert "secret" not in lines.getvalue()


def test_the_flag_takes_the_two_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_settings(["--model", "x", "--log-format", "json"]).log_format == "json"
    with pytest.raises(SystemExit):
        parse_settings(["--model", "x", "--log-format", "xml"])
    assert "'xml'" in capsys.readouterr().err
