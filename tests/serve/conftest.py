"""The tiny model as a real artifact, engines over it, and a real server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.postgres import Postgres, running
from proto.manifest import Manifest, load
from serve.choices import Block, Choices
from serve.engine import Engine
from serve.metrics import Metrics
from serve.plan import Runner
from serve.runner import StockRunner, open_session
from serve.scheduler import Scheduler
from serve.slot_cache import SlotCache
from serve.tokenizer import Tokenizer
from tests.serve.tiny import CAPACITY, CHUNK, SLOTS, Server, deliver, make_artifact, start_server, stop_server


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifact"), measure=True)


@pytest.fixture(scope="session")
def manifest(artifact: Path) -> Manifest:
    return load(artifact)


@pytest.fixture(scope="session")
def make_runner(artifact: Path, manifest: Manifest) -> Callable[[], StockRunner]:
    session = open_session(artifact, 2)
    return lambda: StockRunner(session, manifest.architecture, num_slots=SLOTS, capacity=CAPACITY, max_rows=CHUNK)


@pytest.fixture
def make_engine(artifact: Path, manifest: Manifest, make_runner: Callable[[], Runner]) -> Callable[..., Engine]:
    def make(runner: Runner | None = None, max_queue: int = 64, timeout: float = 600) -> Engine:
        choices = Choices(2, "test", CAPACITY, SLOTS, "test", Block(CAPACITY, 0, "int8"), SLOTS)
        scheduler = Scheduler(
            SlotCache(SLOTS, CAPACITY, CHUNK),
            max_running=SLOTS,
            max_queue=max_queue,
            prefill_chunk=CHUNK,
            any_chunking=False,
            itl_limit=2.0,
            speculate=True,
        )
        return Engine(
            runner or make_runner(),
            scheduler,
            Tokenizer(artifact),
            Metrics("tiny").engine(manifest, choices),
            deliver,
            eos_token_ids=tuple(manifest.architecture.eos_token_ids),
            vocab_size=manifest.architecture.vocab_size,
            request_timeout_seconds=timeout,
        )

    return make


@pytest.fixture(scope="session")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(artifact, tmp_path_factory.mktemp("records") / "records.sqlite")
    yield running
    assert stop_server(running) == 0


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.system)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind, as `--records` names it."""
    if request.param == "sqlite":
        return str(tmp_path / "new" / "records.sqlite")
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(f"records_{uuid.uuid4().hex}")
