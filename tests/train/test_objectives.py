from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from tests.train.tiny import make_checkpoint
from train import head_loss
from train.batch import IGNORE, Batch
from train.errors import TrainError
from train.model import Model, load_model
from train.objectives import OBJECTIVES, make_objective


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 4 * 260)
    torch.manual_seed(0)
    return load_model(make_checkpoint(tmp_path, tie_word_embeddings=request.param), dtype=torch.float32)


def make_batch(ignored: float) -> Batch:
    labels = torch.randint(260, (3, 11)).masked_fill(torch.rand(3, 11) < ignored, IGNORE)
    return Batch(torch.randint(260, (3, 11)), torch.arange(11).expand(3, 11), labels)


@pytest.mark.parametrize("name", ["next-token", "sft"])
def test_tokens_are_foretold_where_they_are_learnt(model: Model, name: str) -> None:
    batch = make_batch(ignored=0.4)
    ours = make_objective(name)(model, batch).total
    logits = model(batch.tokens, batch.positions, linear).flatten(0, 1)
    wanted = cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(ours, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, parameters), rtol=1e-4, atol=1e-5)


def test_nothing_to_learn_gives_every_parameter_a_gradient_of_zero(model: Model) -> None:
    loss = make_objective("next-token")(model, make_batch(ignored=1.1)).total
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_micro_batches_add_up(model: Model) -> None:
    batch = make_batch(ignored=0.4)
    objective = make_objective("next-token")
    whole = objective(model, batch).total.item()
    parts = sum(objective(model, part).total.item() for part in batch.split(2))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_autocast_is_near(model: Model) -> None:
    batch = make_batch(ignored=0.4)
    objective = make_objective("next-token")
    exact = objective(model, batch).total
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(model, batch).total
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    rough.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_options_have_the_kind_that_is_registered() -> None:
    for name, kind in OBJECTIVES.items():
        assert kind.shapes
        if kind.teacher:
            with pytest.raises(TrainError, match="needs a teacher"):
                make_objective(name)
        else:
            assert callable(make_objective(name, kind.options() if kind.options else None))
    with pytest.raises(TrainError, match="objective 'ppo' is unknown; give one of next-token, sft"):
        make_objective("ppo")
