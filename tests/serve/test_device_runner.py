"""The runner of artifacts for CUDA over the host's memory: all but the name of the device is what a GPU runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from proto.manifest import Manifest, load
from serve import device_session
from serve.choices import SettingsError, choose, kv_budget
from serve.device_memory import DeviceArray
from serve.device_runner import DeviceRunner, ladder
from serve.device_session import DeviceSession, DeviceUnavailable, devices_of, open_device_session
from serve.device_stream import HOST, ON_HOST, Device
from serve.engine import Engine
from serve.engines import Engines
from serve.forms import DeviceForm, pick
from serve.metrics import Metrics
from serve.plan import Copy, Output, Plan
from serve.request import SamplingParams
from serve.sampler import Sampler, logprob, prompt_logprobs
from serve.settings import Settings, parse_settings
from serve.tokenizer import Tokenizer
from tests.serve.devices import DEVICES
from tests.serve.tiny import CAPACITY, CHUNK, SLOTS, ask, deliver, finish, make_artifact

GPU = Device("cuda", 1)
MakeRunner = Callable[[int], DeviceRunner]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("cuda"), target="cuda", force=False, measure=True)


@pytest.fixture(scope="module")
def made_for_cuda(directory: Path) -> Manifest:
    return load(directory)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.param
    return found


@pytest.fixture(scope="module")
def session(directory: Path, device: Device) -> DeviceSession:
    return open_device_session(directory / "model.onnx", device)


@pytest.fixture
def make_runner(session: DeviceSession, made_for_cuda: Manifest) -> MakeRunner:
    """Of so many slots."""
    sizes = {"capacity": CAPACITY, "max_rows": CHUNK}
    return lambda num_slots: DeviceRunner(
        session, made_for_cuda.architecture, num_slots=num_slots, **sizes, stream=session.stream
    )


@pytest.fixture
def runner(make_runner: MakeRunner) -> DeviceRunner:
    return make_runner(SLOTS)


def step(runner: DeviceRunner, *segments: tuple[int, int, list[int]], temperature: float = 0.0) -> Output:
    plan = Plan()
    for slot, past, tokens in segments:
        plan.add([slot], past, tokens, temperature=temperature)
    return runner.run(plan)


def test_sizes_of_decode_runs() -> None:
    assert ladder(1) == [1]
    assert ladder(8) == [1, 2, 4, 8]
    assert ladder(11) == [1, 2, 4, 8, 11]
    assert ladder(256)[-2:] == [128, 256]


@pytest.mark.parametrize("seed", range(4))
def test_any_company_gives_the_logits_of_being_alone(seed: int, runner: DeviceRunner, make_runner: MakeRunner) -> None:
    """Prompts and decode rows in random order and slots, so that rows are exchanged; rows beside them write junk."""
    random = np.random.default_rng(seed)
    single = make_runner(1)
    texts = [random.integers(2, 500, CAPACITY if n == 0 else int(random.integers(20, 60))).tolist() for n in range(6)]
    prompts = [len(text) - 12 if len(text) == CAPACITY else int(random.integers(1, 20)) for text in texts]
    slots = random.permutation(SLOTS)[:6].tolist()
    done = [0] * 6
    found: list[list[np.ndarray]] = [[] for _ in texts]
    while any(done[n] < len(text) for n, text in enumerate(texts)):
        plan, order = Plan(), []
        for n in random.permutation(6).tolist():
            if done[n] < len(texts[n]) and random.random() < 0.8:
                count = min(CHUNK, prompts[n] - done[n]) if done[n] < prompts[n] else 1
                plan.add([slots[n]], done[n], texts[n][done[n] : done[n] + count])
                done[n] += count
                order.append(n)
        if order:
            output = runner.run(plan)
            for n, row in zip(order, output.rows, strict=True):
                found[n].append(output.logits[row])
    for n, text in enumerate(texts):
        cuts = [*range(0, prompts[n], CHUNK), *range(prompts[n], len(text))]
        for start, end, logits in zip(cuts, [*cuts[1:], len(text)], found[n], strict=True):
            output = step(single, (0, start, text[start:end]))
            np.testing.assert_allclose(logits, output.logits[output.rows[0]], atol=0.02)


def test_a_copied_beginning_is_that_of_its_source(runner: DeviceRunner) -> None:
    tokens = np.random.default_rng(5).integers(2, 500, 40).tolist()
    step(runner, (2, 0, tokens[:32]))
    output = step(runner, (2, 32, tokens[32:]))
    expected = output.logits[output.rows[0]]
    plan = Plan()
    plan.copies.append(Copy(2, 6, 32))
    plan.add([6], 32, tokens[32:])
    output = runner.run(plan)
    np.testing.assert_array_equal(output.logits[output.rows[0]], expected)


def test_what_comes_back_is_what_the_logits_say(runner: DeviceRunner) -> None:
    tokens = np.random.default_rng(6).integers(2, 500, 30).tolist()
    step(runner, (4, 0, tokens[:10]), (1, 0, tokens[10:25]))
    output = step(runner, (4, 10, [7]), (1, 15, [8]), temperature=0.7)
    assert output.candidates is not None
    assert output.candidate_logits is not None
    assert output.total is not None
    for row in output.rows:
        logits = output.logits[row]
        order = np.argsort(-logits, kind="stable")[: output.candidates.shape[1]]
        np.testing.assert_array_equal(output.candidates[row], order)
        np.testing.assert_array_equal(output.candidate_logits[row], logits[order])
        assert output.total[row] == pytest.approx(np.exp((logits - logits.max()) / 0.7).sum(), rel=1e-5)


def test_hidden_states_and_scored_prompts(runner: DeviceRunner) -> None:
    tokens = np.random.default_rng(7).integers(2, 500, CHUNK).tolist()
    plan = Plan()
    plan.add([0], 0, tokens, want="hidden")
    plan.add([1], 0, tokens, scored=CHUNK - 1)
    output = runner.run(plan)
    assert output.hidden.shape == (CHUNK, 64)
    rows = output.rows[: CHUNK - 1]
    scores = prompt_logprobs(output, rows, tokens[1:], 2)
    for row, token, score in zip(rows, tokens[1:], scores, strict=True):
        expected = logprob(output.logits[row], token, 2)
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [id for id, _ in score.top] == [id for id, _ in expected.top]


class Unread:
    """Logits that nobody may fetch."""

    def __getitem__(self, index: object, /) -> object:
        raise AssertionError("a row was fetched")


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8, "temperature": 0.6}, {"temperature": 0.0}, {"top_k": 5}])
def test_a_choice_takes_no_row_from_the_device(params: dict[str, float], runner: DeviceRunner) -> None:
    tokens = np.random.default_rng(8).integers(2, 500, 12).tolist()
    temperature = params.get("temperature", 1.0)
    output = step(runner, (0, 0, tokens), temperature=temperature)
    row = output.rows[0]
    sharp = Output(
        Unread(), output.hidden, [row], output.candidates, np.full(row + 1, 1.5, np.float32), output.candidate_logits
    )
    settings = SamplingParams(max_tokens=8, seed=3, **{"temperature": 1.0, **params})
    chosen, _ = Sampler(settings, [], 512, ()).choose(sharp, row, 0)
    assert output.candidates is not None
    assert chosen in output.candidates[row]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.001])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_a_guess_is_what_the_host_draws(temperature: float, top_p: float, runner: DeviceRunner) -> None:
    """But for rounding, and for draws that go beyond the candidates."""
    random = np.random.default_rng(10)
    right = asked = 0
    for seed in range(12):
        tokens = random.integers(2, 500, 12).tolist()
        plan = Plan()
        for slot in range(3):
            plan.add([slot], 0, tokens[slot:], temperature=temperature)
        params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
        samplers = [Sampler(params, [], 512, ()) for _ in range(3)]
        plan.shares, plan.top_ps = [sampler.share(4 + n) for n, sampler in enumerate(samplers)], [top_p] * 3
        output = runner.run(plan)
        assert output.candidates is not None
        assert output.guesses is not None
        for n, (row, sampler) in enumerate(zip(output.rows, samplers, strict=True)):
            chosen, _ = sampler.choose(output, row, 4 + n)
            if chosen in output.candidates[row]:
                asked += 1
                right += chosen == output.guesses[row]
    assert asked > (0 if temperature == 1 and top_p > 0.3 else 30)
    beyond = temperature == 1 and top_p == 0.9  # the cut is not among the candidates: its mass is not known exactly
    assert right >= asked * (0.8 if beyond else 1)


def test_a_row_that_follows_a_guess_computes_what_it_would_if_it_were_told(make_runner: MakeRunner) -> None:
    """Behind a prompt and behind a decode row, in other slots than before; what came is still there afterwards."""
    tokens = np.random.default_rng(11).integers(2, 500, 30).tolist()
    told, guessing = make_runner(SLOTS), make_runner(SLOTS)
    begun, then = ((4, 0, tokens[:9]), (1, 0, tokens[9:20])), [9, 11]
    expected = step(told, *begun)
    plan = Plan()
    for slot, past, text in begun:
        plan.add([slot], past, text)
    results = guessing.launch(plan)
    for turn in range(4):
        last = plan.wanted
        plan = Plan()
        order = [0, 1] if turn % 2 else [1, 0]
        for n in order:
            plan.add([begun[n][0]], then[n] + turn, [0], follows=last[n])
        if turn == 2:
            plan.add([6], 0, tokens[:13])  # a prompt beside them
        later = guessing.launch(plan)
        found = results()
        assert found.guesses is not None
        for row, other in zip(found.rows[:2], expected.rows[:2], strict=True):
            np.testing.assert_array_equal(found.logits[row], expected.logits[other])
            assert found.guesses[row] == expected.logits[other].argmax()
        known = [int(found.guesses[row]) for row in found.rows[:2]]
        segments = [(begun[n][0], then[n] + turn, [known[n]]) for n in order]
        expected = step(told, *segments, *([(6, 0, tokens[:13])] if turn == 2 else []))
        begun, then = tuple(begun[n] for n in order), [then[n] for n in order]
        results = later
    results()


def test_a_step_that_wants_too_much_is_refused(runner: DeviceRunner) -> None:
    plan = Plan()
    for slot in range(4):
        plan.add([slot], 0, list(range(CHUNK)), want="all")
    with pytest.raises(ValueError, match="a step wants 73 rows of results and there is room for 49"):
        runner.run(plan)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_rows_are_read_written_and_copied_where_they_lie(session: DeviceSession) -> None:
    stream = session.stream
    first = DeviceArray((3, 2, 5), "tensor(float)", stream)
    second = DeviceArray((2, 2, 5), "tensor(float)", stream)
    values = stream.zeros((3, 2, 5), np.float32)
    values[...] = np.arange(30).reshape(3, 2, 5)
    first.upload(values)
    second.clear()
    first.copy_row(2, second, 1)
    back = stream.zeros((2, 2, 5), np.float32)
    first.download(back, 1)
    stream.mark()()
    np.testing.assert_array_equal(back, values[1:])
    np.testing.assert_array_equal(second.fetch(0, 2, np.float32), [np.zeros((2, 5)), values[2]])
    assert (first.row_bytes, first.nbytes) == (40, 120)
    for begin, rows in ((-1, 1), (2, 2), (0, 0)):
        with pytest.raises(IndexError, match=r"rows -?\d to \d of an array of 3"):
            first.fetch(begin, rows, np.float32)


def test_the_cache_is_as_large_as_the_manifest_says(runner: DeviceRunner, made_for_cuda: Manifest) -> None:
    assert runner.kv_bytes == SLOTS * CAPACITY * made_for_cuda.kv_bytes_per_token


# -- what is chosen, and refused ------------------------------------------------------------------------------------


def test_devices_by_name() -> None:
    assert devices_of("cpu") == [HOST]
    assert devices_of("cuda") == [Device("cuda", 0)]
    assert [str(device) for device in devices_of("cuda:0,2")] == ["cuda:0", "cuda:2"]
    with pytest.raises(SystemExit):
        parse_settings(["--model", "x", "--device", "gpu"])


def test_an_artifact_goes_to_the_device_that_it_was_made_for(made_for_cuda: Manifest, manifest: Manifest) -> None:
    assert pick("auto", made_for_cuda, GPU) == DeviceForm(GPU)
    assert pick("auto", made_for_cuda, GPU).phrase == "CUDA graphs on cuda:1"
    with pytest.raises(SettingsError, match=r"made for cuda and this server computes on cpu.*--device cuda"):
        pick("auto", made_for_cuda)
    with pytest.raises(SettingsError, match=r"made for cpu and this server computes on cuda:1.*--target cuda"):
        pick("auto", manifest, GPU)
    with pytest.raises(SettingsError, match="--form native cannot be met on cuda:1"):
        pick("native", made_for_cuda, GPU)


def test_slots_and_budget_of_a_gpu(made_for_cuda: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 3 << 20, 1: 2 << 20}
    monkeypatch.setattr("serve.choices.free_bytes", lambda device: free[device.number])
    settings = Settings(model=Path("x"), device="cuda:0,1", max_context=128)
    assert kv_budget(settings) == 1 << 20
    chosen = choose(settings, made_for_cuda, DeviceForm(GPU), kv_budget(settings))
    assert chosen.num_slots == (1 << 20) // (128 * made_for_cuda.kv_bytes_per_token)
    assert choose(settings, made_for_cuda, DeviceForm(GPU), 1 << 40).num_slots == 256


def test_a_machine_without_cuda_is_told_the_cure(directory: Path) -> None:
    """This one: nothing goes on silently on the CPU."""
    with pytest.raises(DeviceUnavailable, match=r"has no CUDAExecutionProvider\. .*requirements/gpu\.txt"):
        open_device_session(directory / "model.onnx", GPU)
    with pytest.raises(SettingsError, match=r"cuda:1 cannot be used"):
        DeviceForm(GPU).open(directory, 1)
    with pytest.raises(SettingsError, match=r"--device cuda cannot be met: .*requirements/gpu\.txt"):
        kv_budget(Settings(model=Path("x"), device="cuda"))


def test_a_provider_that_does_not_load_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself only warns, and computes on the CPU."""
    monkeypatch.setattr(device_session, "CudaStream", lambda device: ON_HOST)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [device_session.PROVIDER, "CPUExecutionProvider"])
    failed = pytest.raises(DeviceUnavailable, match=r"did not load, and ONNX Runtime's log above says why")
    with failed, pytest.warns(UserWarning, match="not in available provider names"):
        open_device_session(directory / "model.onnx", GPU)


def test_a_machine_without_a_driver_is_told_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: Device) -> None:
        raise OSError(f"cudaSetDevice on {device}: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(ort, "get_available_providers", lambda: [device_session.PROVIDER])
    monkeypatch.setattr(device_session, "CudaStream", fail)
    with pytest.raises(DeviceUnavailable, match=r"cuda:1 cannot be used: cudaSetDevice on cuda:1: .*NVIDIA driver"):
        open_device_session(directory / "model.onnx", GPU)


# -- engines --------------------------------------------------------------------------------------------------------

MakeOne = Callable[[Metrics, int], Engine]


@pytest.fixture
def make_one(directory: Path, made_for_cuda: Manifest, session: DeviceSession, device: Device) -> MakeOne:
    settings = Settings(model=directory, kv_budget_mib=8, max_context=CAPACITY, slots=SLOTS, prefill_chunk=CHUNK)
    form = DeviceForm(device)

    def make(metrics: Metrics, number: int) -> Engine:
        choices = choose(settings, made_for_cuda, form, kv_budget(settings))
        return Engine(
            *form.build(session, made_for_cuda, settings, choices),
            Tokenizer(directory),
            metrics.engine(made_for_cuda, choices, number),
            deliver,
            eos_token_ids=tuple(made_for_cuda.architecture.eos_token_ids),
            vocab_size=made_for_cuda.architecture.vocab_size,
            request_timeout_seconds=600,
        )

    return make


def test_an_engine_answers_alike_alone_and_in_company(make_one: MakeOne) -> None:
    """Greedy, drawn and penalized ones, more than there are slots."""
    random = np.random.default_rng(9)

    def requests() -> list:
        made = []
        for n in range(12):
            prompt = random.integers(2, 500, int(random.integers(3, 50))).tolist()
            params = {"temperature": 0.0} if n % 3 == 0 else {"temperature": 0.9, "seed": n, "top_p": 0.9}
            params |= {"frequency_penalty": 0.5} if n % 4 == 1 else {}
            made.append((prompt, {**params, "max_tokens": 12, "ignore_eos": True}))
        return made

    asked = requests()
    together = finish(make_one(Metrics("tiny"), 0), *(ask(prompt, **params) for prompt, params in asked))
    engine = make_one(Metrics("tiny"), 0)
    alone = [finish(engine, ask(prompt, **params))[0] for prompt, params in asked]
    same = [a == b for a, b in zip(together, alone, strict=True)]
    assert sum(same) >= len(same) - 1  # float sums of batches of other sizes may turn a tie


def test_going_ahead_changes_no_answer(make_one: MakeOne) -> None:
    """Stops that are foreseen or not, draws, penalties, scores, embeddings: as when every run is waited for."""
    random = np.random.default_rng(12)
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True},
        {"temperature": 1.0, "seed": 1, "max_tokens": 14, "stop_token_ids": tuple(range(0, 500, 9))},
        {"temperature": 0.8, "seed": 2, "max_tokens": 12, "top_p": 0.9, "logprobs": 2},
        {"temperature": 0.7, "seed": 3, "max_tokens": 12, "frequency_penalty": 0.8, "ignore_eos": True},
        {"temperature": 0.9, "seed": 4, "max_tokens": 5, "top_k": 3, "prompt_logprobs": 1},
        {"temperature": 1.0, "seed": 5, "max_tokens": 1},
        {"temperature": 0.0, "max_tokens": 0, "embed": True},
    ]
    asked = [(random.integers(2, 500, int(random.integers(3, 40))).tolist(), ways[n % len(ways)]) for n in range(21)]

    def answers(engine: Engine) -> list[Any]:
        requests = [ask(prompt, **params) for prompt, params in asked]
        for request in requests:  # one by one: batches of other sizes round otherwise
            finish(engine, request)
        return [[replace(chunk, error=None) for chunk in request.channel.chunks] for request in requests]  # type: ignore[attr-defined]

    waiting = make_one(Metrics("tiny"), 0)
    waiting.runner.guesses = waiting.scheduler.ahead = False
    assert answers(make_one(Metrics("tiny"), 0)) == answers(waiting)


def test_several_engines_share_what_comes(make_one: MakeOne, made_for_cuda: Manifest) -> None:
    metrics = Metrics("tiny")
    engines = [make_one(metrics, number) for number in range(2)]
    both = Engines(engines)
    requests = [ask([5, 6, 7 + n], max_tokens=4, temperature=0.0) for n in range(6)]
    for request in requests:
        both.submit(request)
    assert [engine.load for engine in engines] == [3, 3]
    assert not both.draining
    for engine in engines:
        engine.start()
    assert both.drain(30)
    assert both.draining
    assert all(len(request.channel.tokens) == 4 for request in requests)  # type: ignore[attr-defined]
    text = metrics.render()[0].decode()
    for number in range(2):
        assert f'vllm:generation_tokens_total{{engine="{number}"' in text
    metrics.engine_ended(made_for_cuda.digest)
    metrics.forget(made_for_cuda.digest)
    assert "vllm:generation_tokens_total{" not in metrics.render()[0].decode()
    assert "vllm:e2e_request_latency_seconds_count{" not in metrics.render()[0].decode()
