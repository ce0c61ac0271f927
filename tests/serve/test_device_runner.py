"""The runner of artifacts for CUDA over the host's memory: all but the name of the device is what a GPU runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from proto.manifest import Manifest, load
from serve import device_memory
from serve.choices import SettingsError, choose, kv_budget
from serve.device_memory import HOST, Device, DeviceArray, DeviceUnavailable, devices_of, open_device_session
from serve.device_runner import DeviceRunner, ladder
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
def session(directory: Path, device: Device) -> ort.InferenceSession:
    return open_device_session(directory / "model.onnx", device)


@pytest.fixture
def make_runner(session: ort.InferenceSession, made_for_cuda: Manifest, device: Device) -> MakeRunner:
    """Of so many slots."""
    sizes = {"capacity": CAPACITY, "max_rows": CHUNK, "device": device}
    return lambda num_slots: DeviceRunner(session, made_for_cuda.architecture, num_slots=num_slots, **sizes)


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


def test_a_step_that_wants_too_much_is_refused(runner: DeviceRunner) -> None:
    plan = Plan()
    for slot in range(4):
        plan.add([slot], 0, list(range(CHUNK)), want="all")
    with pytest.raises(ValueError, match="a step wants 73 rows of results and there is room for 41"):
        runner.run(plan)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_rows_are_read_written_and_copied_where_they_lie(device: Device) -> None:
    first = DeviceArray((3, 2, 5), "tensor(float)", device)
    second = DeviceArray((2, 2, 5), "tensor(float)", device)
    values = np.arange(30, dtype=np.float32).reshape(3, 2, 5)
    first.write(values)
    second.clear()
    first.copy_row(2, second, 1)
    np.testing.assert_array_equal(first.read(1, 2, np.float32), values[1:])
    np.testing.assert_array_equal(second.read(0, 2, np.float32), [np.zeros((2, 5)), values[2]])
    assert (first.row_bytes, first.nbytes) == (40, 120)
    for begin, rows in ((-1, 1), (2, 2), (0, 0)):
        with pytest.raises(IndexError, match=r"rows -?\d to \d of an array of 3"):
            first.read(begin, rows, np.float32)


def test_descriptions_of_parts_are_given_back() -> None:
    array = DeviceArray((4, 2), "tensor(int32)", HOST)
    gc.collect()
    before = len(device_memory._alive)
    for _ in range(50):
        array.write(np.zeros((1, 2), np.int32), 3)
    gc.collect()
    assert len(device_memory._alive) == before


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
    monkeypatch.setattr(ort, "get_available_providers", lambda: [device_memory.PROVIDER, "CPUExecutionProvider"])
    failed = pytest.raises(DeviceUnavailable, match=r"did not load, and ONNX Runtime's log above says why")
    with failed, pytest.warns(UserWarning, match="not in available provider names"):
        open_device_session(directory / "model.onnx", GPU)


# -- engines --------------------------------------------------------------------------------------------------------

MakeOne = Callable[[Metrics, int], Engine]


@pytest.fixture
def make_one(directory: Path, made_for_cuda: Manifest, session: ort.InferenceSession, device: Device) -> MakeOne:
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
