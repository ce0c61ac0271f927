import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as plain_cross_entropy

from train import head_loss
from train.head_loss import cross_entropy, log_probabilities, total_loss

POSITIONS, WIDTH, VOCAB = 37, 16, 51


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 10 * VOCAB)


def make(dtype: torch.dtype, positions: int = POSITIONS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype).requires_grad_()
    bias = torch.randn(VOCAB, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(VOCAB, (positions,))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_total_is_cross_entropy(dtype: torch.dtype, tolerance: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = make(dtype)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    loss = total_loss(hidden, weight, bias if with_bias else None, cross_entropy(targets)) / 7
    gradients = torch.autograd.grad(loss, inputs)
    logits = hidden @ weight.T + (bias if with_bias else 0)
    wanted = plain_cross_entropy(logits, targets, reduction="sum") / 7
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_log_probabilities_weighed_by_what_follows(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, bias, targets = make(dtype)
    scale = torch.randn(POSITIONS, dtype=dtype)
    found = log_probabilities(hidden, weight, bias, targets)
    gradients = torch.autograd.grad((found * scale).exp().sum(), (hidden, weight, bias))
    wanted = torch.log_softmax(hidden @ weight.T + bias, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    reference = torch.autograd.grad((wanted * scale).exp().sum(), (hidden, weight, bias))
    torch.testing.assert_close(gradients, reference, rtol=tolerance, atol=tolerance)


def test_autocast_multiplies_in_bfloat16_and_adds_in_float32() -> None:
    hidden, weight, _, targets = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = total_loss(hidden, weight, None, cross_entropy(targets))
        logits = (hidden @ weight.T).float()
    assert logits.dtype == loss.dtype == torch.float32
    wanted = plain_cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    exact = plain_cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert abs(loss - exact) > 1e-3  # so bfloat16 it was
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for found, reference in zip(gradients, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert found.dtype == torch.float32
        assert (found - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("loss", ["total", "each"])
def test_no_positions_give_gradients_of_zero(loss: str) -> None:
    hidden, weight, bias, targets = make(torch.float32, positions=0)
    if loss == "total":
        found = total_loss(hidden, weight, bias, cross_entropy(targets))
    else:
        found = log_probabilities(hidden, weight, bias, targets).sum()
    found.backward()
    assert found == 0
    assert weight.grad is not None
    assert bias.grad is not None
    assert hidden.grad is not None
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_frozen_head_costs_no_gradient() -> None:
    hidden, weight, bias, targets = make(torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    total_loss(hidden, weight, bias, cross_entropy(targets)).backward()
    wanted = plain_cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(wanted, hidden)[0], rtol=1e-5, atol=1e-5)
    assert weight.grad is None
