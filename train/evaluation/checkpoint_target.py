"""A Hugging Face checkpoint as a target, by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from train.errors import DataError, TrainError
from train.evaluation.options import Options
from train.evaluation.targets import Likelihood, Passage, Prompt, Sampling
from train.evaluation.tokenization import LocalTokenization, prompt_tokens
from train.evaluation.windows import Window, log_likelihoods, window_shape

LOGITS_BYTES = 64 << 20  # logits that are made at once
PROBE = 8  # tokens by which the head is tried


class CheckpointTarget:
    """Raises TrainError if the directory cannot be loaded or the options do not fit it."""

    def __init__(self, directory: Path, options: Options) -> None:
        self.directory = directory
        self.tokenization = LocalTokenization(directory)
        self.model = load(AutoModelForCausalLM, directory, options)
        self._batch = options.batch
        self.context: int = context_of(self.model.config)
        self.window, self._stride = window_shape(options.window, options.stride, self.context)
        ends = self.model.generation_config.eos_token_id
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or ())
        tokenizer = self.tokenization.tokenizer
        if self._ends and tokenizer.eos_token_id is None:  # as that of an artifact; lm-evaluation-harness wants one
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self._ends[0])
        # What a checkpoint recommends (top-p, penalties) would fill the gaps in ours: no server would know of it.
        self.model.generation_config = generation_config(eos_token_id=self._ends or None)
        self._plain_head = self._head_is_plain()

    def describe(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "kind": "checkpoint",
            "directory": str(self.directory),
            "model_type": config.model_type,
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "context": self.context,
            "window": self.window,
            "stride": self._stride,
        }

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        tokens = [prompt_tokens(self.tokenization, prompt) for prompt in prompts]
        for number, row in enumerate(tokens):
            if not row or len(row) + sampling.max_tokens > self.context:
                raise DataError(
                    f"prompt {number} has {len(row)} tokens, and with --max-tokens {sampling.max_tokens} must have "
                    f"from 1 to {self.context - sampling.max_tokens}; shorten it, or lower --max-tokens"
                )
        answers = [""] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda number: -len(tokens[number]))
        with tqdm(total=len(order), desc="generating", unit="answer", disable=None) as bar:
            for start in range(0, len(order), self._batch):
                numbers = order[start : start + self._batch]
                rows = [tokens[number] for number in numbers]
                for number, text in zip(numbers, self._continue(rows, sampling, start), strict=True):
                    answers[number] = text
                bar.update(len(numbers))
        return answers

    def log_likelihoods(self, passages: Sequence[Passage]) -> list[Likelihood]:
        return log_likelihoods(passages, self.tokenization, self.score, self.window, self._stride)

    @torch.inference_mode()
    def score(self, windows: list[Window]) -> list[float]:
        sums = [0.0] * len(windows)
        order = sorted(range(len(windows)), key=lambda number: -len(windows[number].tokens))
        with tqdm(total=len(order), desc="reading", unit="window", disable=None) as bar:
            for start in range(0, len(order), self._batch):
                numbers = order[start : start + self._batch]
                rows = [windows[number].tokens for number in numbers]
                for number, states in zip(numbers, self._states(rows), strict=True):
                    sums[number] = self._log_probability(states, windows[number])
                bar.update(len(numbers))
        return sums

    def _states(self, rows: list[list[int]]) -> Iterator[Tensor]:
        """For each row, [length or more, width]: what goes into the head, or comes out of one that is not plain."""
        if self._plain_head:
            tokens = self._padded(rows, left=False)  # on the right, where no token looks
            yield from self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        else:
            # The head does more than multiply (soft caps, scales): there is no way around its full logits, row by row.
            for row in rows:
                yield self.model(input_ids=self._padded([row], left=False), use_cache=False).logits[0]

    def _log_probability(self, states: Tensor, window: Window) -> float:
        targets = torch.tensor(window.tokens[window.first :], device=states.device)
        states = states[window.first - 1 : len(window.tokens) - 1]
        head = self.model.get_output_embeddings() if self._plain_head else torch.nn.Identity()
        rows = max(1, LOGITS_BYTES // (4 * self.model.config.get_text_config().vocab_size))
        total = 0.0
        for part, wanted in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
            losses = functional.cross_entropy(head(part).float(), wanted, reduction="none")
            total -= losses.double().sum().item()
        return total

    @torch.inference_mode()
    def _head_is_plain(self) -> bool:
        """Whether logits are the output embedding's product with the last hidden states, and no more."""
        tokens = torch.arange(PROBE, device=self.model.device)[None]
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        logits = self.model(input_ids=tokens, use_cache=False).logits
        ours = head(self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
        return bool(torch.allclose(ours, logits, rtol=1e-5, atol=1e-5))

    def _padded(self, rows: list[list[int]], *, left: bool) -> Tensor:
        length = max(map(len, rows))
        padded = [[0] * (length - len(row)) * left + row + [0] * (length - len(row)) * (not left) for row in rows]
        return torch.tensor(padded, device=self.model.device)

    def _continue(self, rows: list[list[int]], sampling: Sampling, offset: int) -> list[str]:
        tokens = self._padded(rows, left=True)
        length = tokens.shape[1]
        mask = self._padded([[1] * len(row) for row in rows], left=True)
        sampled = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        config = generation_config(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=0,
            **(sampled if sampling.temperature else {}),
        )
        criteria = [StopTexts(self.tokenization, length, sampling.stop)] if sampling.stop else []
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed + offset)
            made = self.model.generate(
                tokens, attention_mask=mask, generation_config=config, stopping_criteria=criteria
            )
        return [self._text(row[length:].tolist(), sampling.stop) for row in made]

    def _text(self, tokens: list[int], stop: tuple[str, ...]) -> str:
        ended = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self.tokenization.decode(tokens[:ended]).rstrip("\ufffd")  # a character that was cut short
        return text[: min((place for place in map(text.find, stop) if place >= 0), default=None)]


class StopTexts(StoppingCriteria):
    """Ends a row whose generated text holds one of `stop`; transformers' own looks into the prompt as well."""

    def __init__(self, tokenization: LocalTokenization, prompt_length: int, stop: tuple[str, ...]) -> None:
        self._tokenization = tokenization
        self._prompt_length = prompt_length
        self._stop = stop
        self._tail = max(len(text.encode()) for text in stop) + 8  # tokens: each has a byte, but for special ones

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        texts = [self._tokenization.decode(row[-self._tail :]) for row in input_ids[:, self._prompt_length :].tolist()]
        ended = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def generation_config(**values: Any) -> GenerationConfig:
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]


def load(kind: Any, directory: Path, options: Options) -> Any:
    """The model in evaluation mode, on its device. Raises TrainError."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = kind.from_pretrained(directory, dtype=options.dtype, local_files_only=True)
        return model.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainError(f"{directory} cannot be loaded on {device}: {error}") from error


def context_of(config: Any) -> int:
    """In tokens. Raises TrainError if the configuration does not tell."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    raise TrainError(f"the configuration of a {config.model_type} names no max_position_embeddings; add it")
