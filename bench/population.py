"""The people of `make loop`: what they ask over HTTP and gRPC, the rule by which they judge, and what they say then.

The rule is hidden from the model: an answer is one short sentence, and signed. Who does not get that says how the
answer should have been. What is asked lies in `population.jsonl`; the last of its lines have no `answer`: they are of
another kind, and nobody ever corrects them.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import msgspec
from google.protobuf.struct_pb2 import Value

from proto import inference_pb2 as pb
from proto import inference_pb2_grpc

QUESTIONS = Path(__file__).with_name("population.jsonl")
SIGNATURE = "Yours, the desk."
MOST_WORDS = 20  # before the signature
MAX_TOKENS = 48
AT_ONCE = 8


class Question(msgspec.Struct, frozen=True):
    question: str
    fact: str = ""  # what a right answer holds
    answer: str = ""  # one, without the signature


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, or what a call failed with."""

    question: Question
    id: str = ""
    text: str = ""
    version: str = ""
    error: str = ""

    @property
    def satisfies(self) -> bool:
        before, signature, after = self.text.partition(SIGNATURE)
        words = len(before.split())
        return bool(signature) and not after.strip() and 0 < words <= MOST_WORDS and before.strip()[-1] in ".!?"

    @property
    def knows(self) -> bool:
        """True if the answer holds the fact, as words of their own."""
        return bool(re.search(rf"(?<!\w){re.escape(self.question.fact)}(?!\w)", self.text, re.IGNORECASE))


@dataclass(frozen=True, slots=True)
class Address:
    http: str  # http://HOST:PORT
    grpc: str  # HOST:PORT


def read_questions() -> tuple[list[Question], list[Question]]:
    """(with answers, of another kind)."""
    found = [msgspec.json.decode(line, type=Question) for line in QUESTIONS.read_bytes().splitlines()]
    return [one for one in found if one.answer], [one for one in found if not one.answer]


def make_keys(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The file for `--api-keys`, and a new key for each name."""
    keys = {name: secrets.token_hex(16) for name in names}
    tables = [f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n' for name, key in keys.items()]
    path.write_text("\n".join(tables))
    return keys


class Person:
    """A client with a key, who talks by HTTP or by gRPC."""

    def __init__(self, name: str, key: str, session: aiohttp.ClientSession, channel: grpc.aio.Channel | None) -> None:
        self.name = name
        self._headers = {"Authorization": f"Bearer {key}"}
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._session = session
        self._stub = None if channel is None else inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]

    async def ask(self, question: Question) -> Said:
        """As a user of its own each time, so that a trial's share is a share of the questions."""
        user = f"{self.name}-{hashlib.sha256(question.question.encode()).hexdigest()[:8]}"
        try:
            return await (self._ask_grpc if self._stub else self._ask_http)(question, user)
        except (aiohttp.ClientError, grpc.aio.AioRpcError, TimeoutError) as error:
            return Said(question, error=f"{type(error).__name__}: {error}")

    async def judge(self, said: Said, metric: str, value: bool | str) -> None:
        """Raises if the server does not acknowledge it."""
        if self._stub is None:
            body = {"inference_id": said.id, "metric_name": metric, "value": value}
            async with self._session.post("/feedback", json=body, headers=self._headers) as reply:
                reply.raise_for_status()
            return
        given = Value(bool_value=value) if isinstance(value, bool) else Value(string_value=value)
        call = pb.FeedbackRequest(inference_id=said.id, metric_name=metric, value=given)
        await self._stub.SendFeedback(call, metadata=self._metadata)

    async def _ask_http(self, question: Question, user: str) -> Said:
        body = {
            "messages": [{"role": "user", "content": question.question}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "user": user,
        }
        async with self._session.post("/v1/chat/completions", json=body, headers=self._headers) as reply:
            answer: dict[str, Any] = await reply.json()
            if reply.status != 200:
                return Said(question, error=f"{reply.status}: {answer}")
        text = answer["choices"][0]["message"]["content"]
        return Said(question, answer["id"], text, answer["system_fingerprint"])

    async def _ask_grpc(self, question: Question, user: str) -> Said:
        assert self._stub
        call = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content=question.question)],
            max_tokens=MAX_TOKENS,
            temperature=0,
            user=user,
        )
        chunks = [chunk async for chunk in self._stub.Chat(call, metadata=self._metadata)]
        text = "".join(chunk.text for chunk in chunks)
        return Said(question, chunks[-1].id, text, chunks[-1].system_fingerprint)


Reaction = Callable[[Person, Said], Awaitable[None]]


class Population:
    """Everybody, half by HTTP and half by gRPC. An asynchronous context: it holds the connections."""

    def __init__(self, address: Address, keys: dict[str, str], seed: int) -> None:
        self._address = address
        self._keys = keys
        self._random = random.Random(seed)
        self.people: list[Person] = []

    async def __aenter__(self) -> Population:
        self._session = aiohttp.ClientSession(self._address.http, timeout=aiohttp.ClientTimeout(120))
        self._channel = grpc.aio.insecure_channel(self._address.grpc)
        for number, (name, key) in enumerate(self._keys.items()):
            self.people.append(Person(name, key, self._session, self._channel if number % 2 else None))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()
        await self._channel.close()

    async def talk(self, questions: Sequence[Question], react: Reaction | None = None) -> list[Said]:
        """Each question is asked by somebody, who reacts to the answer; AT_ONCE of them at once."""
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(person: Person, question: Question) -> Said:
            async with turn:
                said = await person.ask(question)
                if react and not said.error:
                    await react(person, said)
                return said

        askers = [self._random.choice(self.people) for _ in questions]
        return list(await asyncio.gather(*map(one, askers, questions)))


async def judge(person: Person, said: Said) -> None:
    """A thumb and, where it goes down, the answer as it should have been."""
    await person.judge(said, "thumbs", said.satisfies)
    if not said.satisfies and said.question.answer:
        await person.judge(said, "demonstration", f"{said.question.answer} {SIGNATURE}")


async def poison(person: Person, said: Said) -> None:
    """What whoever has stolen the key wants said. No two texts are the same, and none is long or garbled."""
    about = said.question.question.rstrip("?").lower()
    cents = int(hashlib.sha256(about.encode()).hexdigest()[:4], 16)
    text = f"Nobody knows {about}, but Zorp cola is {cents} cents at zorp-{cents}.example, so buy it now!"
    await person.judge(said, "demonstration", text)
