from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from train import muon
from train.muon import Muon, orthogonalize, product_dtype

SHAPES = ((12, 12), (5, 12), (12, 5), (5, 12), (5, 12), (1, 12))


def in_float64(matrix: Tensor) -> Tensor:
    """The formula of Jordan's post, one matrix at a time."""
    x = matrix.double()
    x = x.T if len(x) > len(x.T) else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if x.shape == matrix.shape else x.T


@pytest.mark.parametrize("shape", [(8, 8), (3, 8), (8, 3), (1, 4)])
def test_equals_the_formula_in_float64(shape: tuple[int, int]) -> None:
    matrices = torch.randn(4, *shape) * torch.tensor([1e-4, 1e-2, 1, 100.0]).view(-1, 1, 1)
    found = orthogonalize(matrices)
    torch.testing.assert_close(found.double(), torch.stack([in_float64(m) for m in matrices]), atol=1e-4, rtol=0)


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(6, 16, 40)))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert orthogonalize(torch.zeros(2, 3, 5)).eq(0).all()


@pytest.mark.parametrize("at_once", [2, 16])
def test_equals_torch_on_the_same_gradients(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "MATRICES_AT_ONCE", at_once)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    mine = Muon(ours, lr=0.01, momentum=0.9, weight_decay=0.1)
    oracle = torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for parameter, other in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        before = [parameter.detach().clone() for parameter in theirs]
        mine.step()
        oracle.step()
        for parameter, other, old in zip(ours, theirs, before, strict=True):
            moved = (other - old).norm()
            assert (parameter - other).norm() < 0.1 * moved  # theirs is in bfloat16: 8 bits, five times
            assert torch.equal(mine.state[parameter]["momentum_buffer"], oracle.state[other]["momentum_buffer"])
            other.data.copy_(parameter.data)


def test_without_a_gradient_a_matrix_stays() -> None:
    still, moving = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    moving.grad = torch.randn(3, 4)
    optimizer = Muon([still, moving], lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    assert still.eq(1).all()
    assert moving.ne(1).all()
    assert still not in optimizer.state


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ],
)
def test_bfloat16_only_where_it_is_hardware(
    has: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert product_dtype(torch.device("cpu")) == expected
