import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.train.tiny import make_checkpoint
from train.adapters import LoraOptions, attach, disabled, merge
from train.batch import Batch
from train.model import Model, Quantization, load_model
from train.objectives import make_objective

BATCH = Batch(torch.arange(16).view(2, 8), torch.arange(8).expand(2, 8), torch.arange(1, 17).view(2, 8))
# bitsandbytes compiles a helper in a way that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def steps(model: Model, count: int = 3) -> list[float]:
    """The losses of some steps of training of what can be trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = make_objective("next-token")(model, BATCH).total / BATCH.count
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits_of(model: Model) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(BATCH.tokens, BATCH.positions, linear)
    return found


def gpt2(directory: Path) -> Path:
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0)
    config.attn_pdrop = 0.0
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("make", [make_checkpoint, gpt2], ids=["llama", "gpt2"])
def test_adapters_alone_train_and_merge_into_the_weights(make: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_model(make(tmp_path / "base"), dtype=torch.float32)  # type: ignore[operator]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    untrained = logits_of(model)
    attach(model, LoraOptions(rank=4, alpha=16))
    torch.testing.assert_close(logits_of(model), untrained)
    losses = steps(model)
    assert losses[-1] < losses[0] - 0.05

    blocks = sum(isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D" for m in model.modules())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained)
    # An adapted product holds the base and two adapters; beside them is the head.
    assert len(trained) == 2 * (blocks - 1) / 3
    for name, value in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])

    adapted = logits_of(model)
    assert (adapted - untrained).abs().max() > 0.01
    merge(model).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(BATCH.tokens).logits, adapted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(model), adapted)
    steps(model, 1)  # merging leaves the model to train on


def test_merged_model_runs_as_it_is(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path), dtype=torch.float32)
    attach(model, LoraOptions(rank=2))
    steps(model, 1)
    merged = merge(model)
    assert not any(parameter.is_meta for parameter in (*merged.parameters(), *merged.buffers()))
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(merged(BATCH.tokens).logits, logits_of(model), rtol=1e-4, atol=1e-5)


def test_disabled_is_the_base_without_dropout_and_is_undone(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, attention_dropout=0.5), dtype=torch.float32).train()
    base = copy.deepcopy(model).eval()
    attach(model, LoraOptions(rank=2, dropout=0.5))
    steps(model, 1)
    with disabled(model):
        torch.testing.assert_close(logits_of(model), logits_of(base))
        assert not model.training
    assert model.training
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(logits_of(model.eval()), logits_of(base))


def test_a_classifier_trains_its_head_too(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path), dtype=torch.float32, classes=3)
    attach(model, LoraOptions(rank=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if ".lora_" not in name] == ["network.score.weight"]
    assert torch.equal(merge(model).score.weight, model.head.weight)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_on_a_quantized_base(quantization: Quantization, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = make_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=128)
    exact = logits_of(load_model(checkpoint, dtype=torch.float32))
    model = load_model(checkpoint, dtype=torch.float32, quantization=quantization)
    rough = logits_of(model)
    assert 0 < (rough - exact).abs().max() < 0.5
    codes = model.layers[0].mlp.up_proj.weight
    assert codes.dtype == (torch.uint8 if quantization == "nf4" else torch.int8)
    attach(model, LoraOptions(rank=4, alpha=16))
    before = codes.clone()
    losses = steps(model, 4)
    assert losses[-1] < losses[0] - 0.02
    assert torch.equal(model.layers[0].mlp.up_proj.base_layer.weight, before)
    merge(model).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        # int8 rounds the activations too, which the merged model does not.
        tolerance = 1e-3 if quantization == "nf4" else 0.05
        torch.testing.assert_close(merged(BATCH.tokens).logits, logits_of(model), rtol=tolerance, atol=tolerance)
