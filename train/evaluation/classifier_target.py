"""A checkpoint with a classification head as a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from train.evaluation.checkpoint_target import context_of, load
from train.evaluation.options import Options
from train.evaluation.tokenization import LocalTokenization


class ClassifierTarget:
    """Raises TrainError if the directory cannot be loaded."""

    def __init__(self, directory: Path, options: Options) -> None:
        self.directory = directory
        self.tokenization = LocalTokenization(directory)
        self.model = load(AutoModelForSequenceClassification, directory, options)
        self.context = context_of(self.model.config)
        self.labels: tuple[str, ...] = tuple(name for _, name in sorted(self.model.config.id2label.items()))
        self._pad: int | None = self.model.config.get_text_config().pad_token_id
        # Without a token for padding, transformers cannot tell where a row of a batch ends.
        self._batch = 1 if self._pad is None else options.batch

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "classifier",
            "directory": str(self.directory),
            "model_type": self.model.config.model_type,
            "parameters": self.model.num_parameters(),
            "labels": list(self.labels),
            "context": self.context,
        }

    @torch.inference_mode()
    def classify(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text; of one beyond the context, of its beginning."""
        tokens = [self.tokenization.encode(text, special=True)[: self.context] for text in texts]
        labels = [""] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda number: -len(tokens[number]))
        with tqdm(total=len(order), desc="classifying", unit="text", disable=None) as bar:
            for start in range(0, len(order), self._batch):
                numbers = order[start : start + self._batch]
                rows = [tokens[number] for number in numbers]
                length = max(map(len, rows))
                padded = torch.tensor([row + [self._pad or 0] * (length - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
                device = self.model.device
                logits = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
                for number, best in zip(numbers, logits.argmax(-1).tolist(), strict=True):
                    labels[number] = self.labels[best]
                bar.update(len(numbers))
        return labels
