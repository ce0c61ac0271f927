from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.train.tiny import make_checkpoint
from train.batch import IGNORE, Batch
from train.model import load_model
from train.objectives import make_objective


def test_loss_is_that_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_model(make_checkpoint(tmp_path / "lm"), dtype=torch.float32, classes=3)
    model.network.save_pretrained(tmp_path / "classifier")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", pad_token_id=259)
    lengths = torch.tensor([7, 4, 6])
    tokens = torch.randint(259, (3, 7))
    padding = torch.arange(7) >= lengths[:, None]
    tokens[padding] = 259
    target = torch.tensor([2, 0, 2])
    extras = {"target": target, "last": lengths - 1, "weight": torch.ones(3)}
    batch = Batch(tokens, torch.arange(7).expand(3, 7), torch.full((3, 7), IGNORE), extras)

    ours = make_objective("classify")(model, batch)
    wanted = theirs(tokens, attention_mask=~padding, labels=target)
    torch.testing.assert_close(ours.total / batch.count, wanted.loss)
    assert ours.metrics["accuracy"] == (wanted.logits.argmax(-1) == target).sum()
    (ours.total / batch.count).backward()
    wanted.loss.backward()
    for found, reference in zip(model.network.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, reference.grad)


def test_weights_count_examples(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path), dtype=torch.float32, classes=2)
    tokens = torch.randint(260, (2, 5))

    def total(weight: list[float]) -> float:
        extras = {"target": torch.tensor([0, 1]), "last": torch.tensor([4, 2]), "weight": torch.tensor(weight)}
        batch = Batch(tokens, torch.arange(5).expand(2, 5), torch.full((2, 5), IGNORE), extras)
        return make_objective("classify")(model, batch).total.item()

    assert total([2.0, 0.5]) == pytest.approx(2 * total([1.0, 0.0]) + 0.5 * total([0.0, 1.0]), rel=1e-5)
