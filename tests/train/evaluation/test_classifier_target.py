"""A checkpoint with a classification head, against transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from tests.train.tiny import make_config, make_tokenizer
from train.evaluation.classifier_target import ClassifierTarget
from train.evaluation.options import Options
from train.evaluation.targets import Classifier, Target, open_target

TEXTS = ["short", "a longer text", "another one", "?", "x" * 300]


@pytest.mark.parametrize("pad_token", [None, 1])
def test_labels_are_those_of_each_text_alone(tmp_path: Path, pad_token: int | None) -> None:
    torch.manual_seed(0)
    labels = {0: "bad", 1: "so so", 2: "good"}
    config = make_config(num_labels=3, id2label=labels, pad_token_id=pad_token)
    model = LlamaForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() > 1 else 1
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    target = open_target(tmp_path, Options(batch=3))
    assert isinstance(target, ClassifierTarget)
    assert isinstance(target, Classifier)
    assert not isinstance(target, Target)
    with torch.no_grad():
        wanted = [
            labels[
                int(
                    model(
                        input_ids=torch.tensor([list(target.tokenization.encode(text, special=True))[:256]])
                    ).logits.argmax()
                )
            ]
            for text in TEXTS
        ]
    assert target.classify(TEXTS) == wanted
    assert len(set(wanted)) > 1
    assert target.describe()["labels"] == ["bad", "so so", "good"]
