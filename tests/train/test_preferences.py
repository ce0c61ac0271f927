"""DPO and KTO against the losses of TRL's own trainers."""

import copy
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.train.tiny import make_checkpoint
from train.adapters import LoraOptions, attach
from train.batch import IGNORE, Batch
from train.errors import TrainError
from train.loss import Loss
from train.model import Model, load_model
from train.objectives import make_objective
from train.preferences import DpoOptions, KtoOptions, answers, mean_of_all

# TRL asks transformers by a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EXTRAS = ("entropy", "mean_logits", "is_top1")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Model, Model]:
    """A model, and the reference that it has moved away from."""
    torch.manual_seed(0)
    reference = load_model(make_checkpoint(tmp_path), dtype=torch.float32)
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return model, reference


def rows(tokens: Tensor, attended: Tensor, answer: Tensor) -> Batch:
    """TRL's [rows, length] as ours: labels shifted, positions counted."""
    labels = tokens.masked_fill(answer == 0, IGNORE).roll(-1, 1)
    labels[:, -1] = IGNORE
    return Batch(tokens, attended.cumsum(1).sub(1).clamp(min=0), labels)


def interleave(first: Batch, second: Batch, **extras: Tensor) -> Batch:
    """first, second, first, ...; both as long as the longer."""
    length = max(first.tokens.shape[1], second.tokens.shape[1])

    def both(name: str, fill: int) -> Tensor:
        parts = [getattr(batch, name) for batch in (first, second)]
        padded = [torch.nn.functional.pad(part, (0, length - part.shape[1]), value=fill) for part in parts]
        return torch.stack(padded, 1).flatten(0, 1)

    return Batch(both("tokens", 0), both("positions", 0), both("labels", IGNORE), extras)


def some_tokens(count: int) -> list[int]:
    return torch.randint(4, 260, (count,)).tolist()


def trainer(kind: Any, model: Model, reference: Model, **settings: Any) -> Any:
    """TRL's trainer with what its loss reads, without data sets and accelerate's set-up."""
    made = object.__new__(kind)
    for network in (model.network, reference.network):
        add_fused_lm_head(network, outputs=("log_probs", *EXTRAS))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    common = {
        "model": model.network,
        "ref_model": reference.network,
        "accelerator": accelerator,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
    }
    vars(made).update(common | settings)
    return made


def compare(model: Model, ours: Loss, count: int, theirs: Tensor) -> None:
    """Loss and gradients of all parameters."""
    parameters = list(model.parameters())
    torch.testing.assert_close(ours.total / count, theirs, **CLOSE)
    found = torch.autograd.grad(ours.total / count, parameters)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, parameters), **CLOSE)
    assert max(float(gradient.abs().max()) for gradient in found) > 1e-3


def pairs(count: int) -> tuple[Batch, dict[str, Tensor]]:
    examples = [
        {"prompt_ids": some_tokens(3 + i), "chosen_ids": some_tokens(5 - i), "rejected_ids": some_tokens(2 + 2 * i)}
        for i in range(count)
    ]
    theirs = DataCollatorForPreference(pad_token_id=0)(examples)
    halves = [theirs[name].chunk(2) for name in ("input_ids", "attention_mask", "completion_mask")]
    chosen, rejected = (rows(*(half[i] for half in halves)) for i in range(2))
    return interleave(chosen, rejected, weight=torch.ones(count)), theirs


def with_thumbs(batch: Batch, weight: list[float]) -> Batch:
    extras = {"weight": torch.tensor(weight), "desirable": torch.tensor([True, False])}
    return Batch(batch.tokens, batch.positions, batch.labels, extras)


# TRL's sigmoid loss takes no smoothing; its `aot` is the smoothed DPO where there is a single pair to sort.
@pytest.mark.parametrize(("loss_type", "count", "smoothing"), [("sigmoid", 3, 0.0), ("aot", 1, 0.2)])
def test_dpo_is_that_of_trl(models: tuple[Model, Model], loss_type: str, count: int, smoothing: float) -> None:
    model, reference = models
    batch, inputs = pairs(count)
    judge = trainer(
        DPOTrainer,
        model,
        reference,
        beta=0.3,
        label_smoothing=smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
    )
    theirs = judge._compute_loss(model.network, inputs, return_outputs=False)
    ours = make_objective("dpo", DpoOptions(beta=0.3, label_smoothing=smoothing), reference=reference)(model, batch)
    compare(model, ours, batch.count, theirs)
    names = {
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
    }
    reported = judge._metrics["train" if model.network.training else "eval"]
    for theirs_name, name in names.items():
        assert float(ours.metrics[name]) / count == pytest.approx(reported[theirs_name][0], abs=1e-5)


@pytest.mark.parametrize("labels", [[True, False, True], [False, False, False]])
def test_kto_is_that_of_trl(models: tuple[Model, Model], labels: list[bool]) -> None:
    model, reference = models
    answered = [some_tokens(5 - i) for i in range(3)]
    examples = [
        {
            "prompt_ids": some_tokens(3 + i),
            "completion_ids": answered[i],
            "KL_completion_ids": answered[i - 1],
            "label": label,
        }
        for i, label in enumerate(labels)
    ]
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
    names = ("input_ids", "attention_mask", "completion_mask")
    matched, mismatched = (rows(*(inputs[prefix + name] for name in names)) for prefix in ("", "KL_"))
    batch = interleave(matched, mismatched, weight=torch.ones(3), desirable=torch.tensor(labels))
    # Away from the answers' own likelihood, so that the drift is above 0 and counts.
    base = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    judge = trainer(KTOTrainer, model, reference, loss_type="kto", calculate_KL=True, **base)
    with torch.no_grad():
        drift = (answers(model, batch) - answers(reference, batch))[1::2].mean()
    if drift < 0:  # then the reference is the one that moved
        model, reference = reference, model
        judge.model, judge.ref_model = model.network, reference.network
    theirs = judge._compute_loss(model.network, inputs, return_outputs=False)
    ours = make_objective("kto", KtoOptions(**base), reference=reference)(model, batch)
    compare(model, ours, batch.count, theirs)
    reported = judge._metrics["train" if model.network.training else "eval"]
    assert reported["kl"][0] > 0
    assert float(ours.metrics["drift"]) / 3 == pytest.approx(reported["kl"][0], rel=1e-4)


def test_drift_below_zero_is_none(models: tuple[Model, Model]) -> None:
    model, reference = models
    thumbs = with_thumbs(pairs(2)[0], [1.0, 1.0])
    objectives = [make_objective("kto", reference=reference), make_objective("kto", reference=model)]
    drifts = [
        float(objectives[0](model, thumbs).metrics["drift"]),
        float(objectives[1](reference, thumbs).metrics["drift"]),
    ]
    assert min(drifts) == 0 < max(drifts)


def test_drift_is_the_mean_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    another = torch.tensor([10.0, 3.0])  # process: the sum and the number of its examples
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(another))
    assert mean_of_all(torch.tensor([1.0, 4.0])).item() == 3.0


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_weights_count_examples(models: tuple[Model, Model], name: str) -> None:
    model, reference = models
    batch, _ = pairs(2)
    objective = make_objective(name, reference=reference)

    def total(weight: list[float]) -> float:
        return objective(model, with_thumbs(batch, weight)).total.item()

    assert total([2.0, 0.5]) == pytest.approx(2 * total([1.0, 0.0]) + 0.5 * total([0.0, 1.0]), rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_of_adapters_is_the_model_without_them(models: tuple[Model, Model], name: str) -> None:
    model, _ = models
    batch, _ = pairs(2)
    batch = Batch(
        batch.tokens, batch.positions, batch.labels, batch.extras | {"desirable": torch.tensor([True, False])}
    )
    before = copy.deepcopy(model)
    with pytest.raises(TrainError, match="no adapters"):
        make_objective(name)(model, batch)
    attach(model, LoraOptions(rank=4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.05 * torch.randn_like(parameter)
    ours = make_objective(name)(model, batch)
    wanted = make_objective(name, reference=before)(model, batch)
    torch.testing.assert_close(ours.total, wanted.total)
    gradients = torch.autograd.grad(ours.total, trained)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted.total, trained))
    assert any(gradient.any() for gradient in gradients)
