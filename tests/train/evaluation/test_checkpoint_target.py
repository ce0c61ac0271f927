"""A checkpoint as a target, against transformers itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tests.train.tiny import make_checkpoint, make_tokenizer
from train.errors import DataError, TrainError
from train.evaluation.checkpoint_target import CheckpointTarget
from train.evaluation.command import checkpoint_target
from train.evaluation.options import Options
from train.evaluation.perplexity import judge
from train.evaluation.targets import Passage, Sampling

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Été, naïve: " * 4, "x = [1, 2]\n"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    directory = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return sharpen(directory)


def sharpen(directory: Path) -> Path:
    """Random weights so large that the model has opinions."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    for parameter in model.parameters():
        parameter.data *= 12 if parameter.dim() > 1 else 1
    model.save_pretrained(directory)
    return directory


def loss_of(model: Any, tokens: list[int], start: int = 1) -> float:
    """Summed, by transformers."""
    labels = torch.tensor([[-100] * start + tokens[start:]])
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([tokens]), labels=labels).loss
    return float(mean) * (len(tokens) - start)


@pytest.mark.parametrize("logits_bytes", [64 << 20, 4 * 260 * 7])
def test_perplexity_is_transformers_own_loss(
    checkpoint: Path, logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_target, "LOGITS_BYTES", logits_bytes)
    target = CheckpointTarget(checkpoint, Options(batch=2))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    losses = [loss_of(model, list(target.tokenization.encode(text, special=True))) for text in TEXTS]
    num_tokens = sum(len(text.encode()) - 1 for text in TEXTS)
    found = judge(target, [{"text": text} for text in TEXTS], Options())
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / num_tokens), rel=1e-5)
    assert found.metrics["bits_per_byte"] == pytest.approx(sum(losses) / num_tokens / math.log(2), rel=1e-5)
    assert found.counts == {"tokens": num_tokens, "bytes": num_tokens}


def test_answers_alone_are_read_after_their_prompt(checkpoint: Path) -> None:
    target = CheckpointTarget(checkpoint, Options())
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    known = target.tokenization.render([{"role": "user", "content": "hi"}])
    answer = target.tokenization.encode("there", special=False)
    found = target.log_likelihoods([Passage([{"role": "user", "content": "hi"}], "there")])[0]
    assert found.log_probability == pytest.approx(-loss_of(model, known + answer, len(known)), rel=1e-5)
    assert (found.tokens, found.num_bytes) == (5, 5)


@pytest.mark.parametrize("stride", [0, 5])
def test_long_texts_are_read_by_windows(checkpoint: Path, stride: int) -> None:
    target = CheckpointTarget(checkpoint, Options(window=16, stride=stride))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = target.tokenization.encode(TEXTS[0], special=True)
    nats, step = 0.0, stride or 15
    nats += loss_of(model, tokens[:16])
    for end in range(16, len(tokens), step):
        window = tokens[end - (16 - step) : end + step]
        nats += loss_of(model, window, 16 - step)
    found = target.log_likelihoods([Passage("", TEXTS[0])])[0]
    assert found.log_probability == pytest.approx(-nats, rel=1e-5)
    assert found.tokens == len(tokens) - 1


def test_a_head_that_does_more_than_multiply_is_found_and_obeyed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        final_logit_softcapping=2.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(sharpen(tmp_path))
    target = CheckpointTarget(tmp_path, Options())
    found = target.log_likelihoods([Passage("", TEXTS[0]), Passage("", TEXTS[2])])
    for text, likelihood in zip((TEXTS[0], TEXTS[2]), found, strict=True):
        tokens = target.tokenization.encode(text, special=True)
        assert likelihood.log_probability == pytest.approx(-loss_of(model, tokens), rel=1e-4)


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.no_grad():
            tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens[-count:]


def test_a_batch_of_prompts_is_continued_as_each_alone(checkpoint: Path) -> None:
    target = CheckpointTarget(checkpoint, Options(batch=3))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompts = ["a", "a much longer prompt", "some", "and one"]
    found = target.generate(prompts, Sampling(12))
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = greedy(model, target.tokenization.encode(prompt, special=True), 12)
        tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
        assert answer == target.tokenization.decode(tokens).rstrip("\ufffd")
    chat = target.generate([[{"role": "user", "content": "hi"}]], Sampling(4))
    known = target.tokenization.render([{"role": "user", "content": "hi"}])
    assert target.tokenization.decode(greedy(model, known, 4)).startswith(chat[0])


def test_answers_end_before_a_stop_string_wherever_tokens_split_it(checkpoint: Path) -> None:
    target = CheckpointTarget(checkpoint, Options())
    prompts = ["one prompt", "another"]
    whole = target.generate(prompts, Sampling(24))
    plain = max((text for text in whole), key=lambda text: len(text.encode("ascii", errors="ignore")))
    stop = plain[3:5]
    stopped = target.generate(prompts, Sampling(24, stop=(stop, "never")))
    assert stopped == [text.split(stop)[0] for text in whole]
    # One in the prompt, or begun there, ends nothing.
    asked = [prompts[0] + stop, prompts[0] + stop[0]]
    ended = target.generate(asked, Sampling(24, stop=(stop,)))
    assert ended == [text.split(stop)[0] for text in target.generate(asked, Sampling(24))]


def test_sampled_answers_depend_on_the_seed_alone(checkpoint: Path) -> None:
    target = CheckpointTarget(checkpoint, Options())
    before = torch.random.get_rng_state()
    answers = [target.generate(["a", "b"], Sampling(16, 1.0, seed)) for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_prompt_beyond_the_context_is_an_error(checkpoint: Path) -> None:
    target = CheckpointTarget(checkpoint, Options())
    with pytest.raises(DataError, match=r"prompt 1 has 250 tokens, and with --max-tokens 10 must have from 1 to 246"):
        target.generate(["a", "x" * 250], Sampling(10))
    with pytest.raises(TrainError, match="--window 257 is beyond the target's context of 256"):
        CheckpointTarget(checkpoint, Options(window=257))


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="holds no tokenizer"):
        CheckpointTarget(tmp_path, Options())
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TrainError, match="cannot be loaded on cpu"):
        CheckpointTarget(tmp_path, Options(device="cpu"))
