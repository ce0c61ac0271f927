"""The server's client, against a server whose figures can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.train.evaluation.fake_server import CONTEXT, FakeServer, log_probability
from train.errors import TrainError
from train.evaluation.command import server_target
from train.evaluation.options import Options
from train.evaluation.server_target import ServerTarget
from train.evaluation.targets import Passage, Sampling, Unable


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(server_target, "FIRST_PAUSE_SECONDS", 0.0)
    fake = FakeServer(lambda prompt, seed: f"{prompt} and {seed}")
    yield fake
    fake.close()


def sum_of(text: str, first: int, start: int = 0) -> float:
    tokens = list(text.encode())[start:]
    return sum(log_probability(tokens, place) for place in range(first - start, len(tokens)))


def test_prompts_are_continued_in_order_with_seeds_of_their_own(server: FakeServer) -> None:
    target = ServerTarget(server.url + "/v1/", Options(batch=4))
    chat = [{"role": "user", "content": "hi"}]
    found = target.generate(["a", "b", chat], Sampling(7, 0.5, seed=40, stop=("x",)))
    assert found == ["a and 40", "b and 41", f"{chat} and 42"]
    common = {"model": "fake", "max_tokens": 7, "temperature": 0.5, "top_p": 1, "stop": ["x"]}
    bodies = sorted(server.bodies, key=lambda body: body["seed"])
    assert bodies == [
        common | {"seed": 40, "prompt": "a"},
        common | {"seed": 41, "prompt": "b"},
        common | {"seed": 42, "messages": chat},
    ]
    assert target.describe() == {"kind": "server", "url": server.url, "model": "fake"}


def test_likelihoods_of_texts_answers_and_conversations(server: FakeServer) -> None:
    target = ServerTarget(server.url, Options())
    long = "éa" + "long text " * 7
    found = target.log_likelihoods(
        [
            Passage("", "hello"),
            Passage("hel", "lo"),
            Passage([{"role": "user", "content": "hi"}], "ho"),
            Passage("", long),
            Passage("", "a"),
            Passage("a", ""),
        ]
    )
    assert found[0].log_probability == pytest.approx(sum_of("hello", 1))
    assert (found[0].tokens, found[0].num_bytes) == (4, 4)
    assert found[1].log_probability == pytest.approx(sum_of("hello", 3))
    assert (found[1].tokens, found[1].num_bytes) == (2, 2)
    assert found[2].log_probability == pytest.approx(sum_of("<hi>ho", 4))
    # Of windows that touch in a token each sees its neighbour, which is all that this server looks at.
    assert found[3].log_probability == pytest.approx(sum_of(long, 1))
    assert (found[3].tokens, found[3].num_bytes) == (len(long.encode()) - 1,) * 2
    assert [(one.log_probability, one.tokens, one.num_bytes) for one in found[4:]] == [(0, 0, 0), (0, 0, 0)]
    assert max(len(body["prompt"]) for body in server.bodies if "echo" in body) == CONTEXT


def test_the_window_can_be_smaller_but_not_larger_than_the_context(server: FakeServer) -> None:
    ServerTarget(server.url, Options(window=8, stride=2)).log_likelihoods([Passage("", "a" * 20)])
    assert [len(body["prompt"]) for body in server.bodies if "echo" in body] == [8] * 7
    with pytest.raises(TrainError, match=f"--window 33 is beyond the target's context of {CONTEXT}"):
        ServerTarget(server.url, Options(window=33)).log_likelihoods([Passage("", "aa")])


def test_a_server_that_refuses_echo_is_judged_by_the_rest(server: FakeServer) -> None:
    server.echo = False
    target = ServerTarget(server.url, Options())
    with pytest.raises(Unable, match=r"no log-probabilities of a prompt .*400: .*echo is not supported"):
        target.log_likelihoods([Passage("", "hello")])
    assert target.generate(["a"], Sampling(1)) == ["a and 0"]


def test_a_server_without_tokenize_needs_a_tokenizer_and_a_window(server: FakeServer) -> None:
    server.refuse["/tokenize"] = (404, 99)
    with pytest.raises(Unable, match=r"/tokenize answers 404.*give --tokenizer DIR and --window TOKENS"):
        ServerTarget(server.url, Options()).log_likelihoods([Passage("", "hello")])


def test_a_busy_server_is_asked_again_and_another_error_is_told(server: FakeServer) -> None:
    target = ServerTarget(server.url, Options())
    server.refuse["/v1/completions"] = (503, 3)
    assert target.generate(["a"], Sampling(1)) == ["a and 0"]
    server.refuse["/v1/completions"] = (429, 99)
    with pytest.raises(TrainError, match="/v1/completions answers 429"):
        target.generate(["a"], Sampling(1))
    server.refuse["/v1/completions"] = (400, 1)
    with pytest.raises(TrainError, match=r"answers 400: .*not now"):
        target.generate(["a", "b", "c"], Sampling(1))


def test_the_key_comes_from_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    ServerTarget(server.url, Options(key_variable="SOME_KEY")).generate(["a"], Sampling(1))
    monkeypatch.delenv("PAWL_API_KEY", raising=False)
    ServerTarget(server.url, Options()).generate(["a"], Sampling(1))
    assert server.headers == ["Bearer secret", None]


def test_no_server_is_an_error() -> None:
    fake = FakeServer(lambda prompt, seed: "")
    fake.close()
    with pytest.raises(TrainError, match=r"does not answer .* is the server running"):
        ServerTarget(fake.url, Options())


def test_a_server_that_lists_no_model_wants_one_named(server: FakeServer) -> None:
    def get(path: str) -> tuple[int, Any]:
        return 200, {"data": []}

    server.get = get  # type: ignore[method-assign]
    with pytest.raises(TrainError, match="lists no model; name one with --model"):
        ServerTarget(server.url, Options())
    assert ServerTarget(server.url, Options(model="mine")).model == "mine"
