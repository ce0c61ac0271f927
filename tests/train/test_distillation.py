from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from tests.train.tiny import make_checkpoint
from train import head_loss
from train.batch import IGNORE, Batch
from train.distillation import DistillOptions
from train.errors import TrainError
from train.model import Model, load_model
from train.objectives import make_objective


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 4 * 260)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Model, Model]:
    """A student, and a teacher of another width whose vocabulary is padded."""
    torch.manual_seed(0)
    student = make_checkpoint(tmp_path / "student", initializer_range=0.2)
    teacher = make_checkpoint(tmp_path / "teacher", hidden_size=48, vocab_size=264, initializer_range=0.2)
    return load_model(student, dtype=torch.float32), load_model(teacher, dtype=torch.float32)


def make_batch() -> Batch:
    tokens = torch.randint(260, (2, 12))
    labels = torch.randint(260, (2, 12)).masked_fill(torch.rand(2, 12) < 0.3, IGNORE)
    return Batch(tokens, torch.arange(12).expand(2, 12), labels)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_is_kl_of_full_logits(models: tuple[Model, Model], temperature: float, ce_weight: float) -> None:
    student, teacher = models
    batch = make_batch()
    options = DistillOptions(temperature=temperature, ce_weight=ce_weight)
    ours = make_objective("distill", options, teacher=teacher)(student, batch)

    learnt = batch.labels != IGNORE
    logits: Tensor = student(batch.tokens, batch.positions, linear)[learnt]
    with torch.no_grad():
        wise = teacher(batch.tokens, batch.positions, linear)[learnt][:, :260]
    kl = kl_div(
        log_softmax(logits / temperature, -1), log_softmax(wise / temperature, -1), reduction="sum", log_target=True
    )
    data = cross_entropy(logits, batch.labels[learnt], reduction="sum")
    wanted = (1 - ce_weight) * temperature**2 * kl + ce_weight * data
    torch.testing.assert_close(ours.total, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.metrics["kl"], kl.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.metrics["cross_entropy"], data.detach(), rtol=1e-5, atol=1e-5)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(ours.total, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, parameters), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(models: tuple[Model, Model]) -> None:
    student, _ = models
    loss = make_objective("distill", teacher=student)(student, make_batch())
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-4
    assert max(float(parameter.grad.abs().max()) for parameter in student.parameters()) < 1e-4


def test_a_teacher_of_fewer_tokens_is_refused(models: tuple[Model, Model]) -> None:
    student, teacher = models
    with pytest.raises(TrainError, match="260 is smaller than the student's 264"):
        make_objective("distill", teacher=student)(teacher, make_batch())
