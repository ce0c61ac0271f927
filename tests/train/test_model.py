from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from tests.train.tiny import make_checkpoint, make_config
from train.errors import TrainError
from train.model import Model, load_model

SMALL = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def logits_of(model: Model, tokens: Tensor, positions: Tensor) -> Tensor:
    found: Tensor = model(tokens, positions, linear)
    return found


def save(network: PreTrainedModel, directory: Path) -> Path:
    network.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "network",
    [LlamaForCausalLM(make_config()), LlamaForCausalLM(make_config(tie_word_embeddings=False)), GPT2LMHeadModel(GPT2)],
    ids=["tied", "untied", "gpt2"],
)
def test_logits_and_layers_are_transformers(network: PreTrainedModel, tmp_path: Path) -> None:
    model = load_model(save(network, tmp_path), dtype=torch.float32).eval()
    tokens = torch.randint(260, (2, 9))
    with torch.no_grad():
        found = logits_of(model, tokens, torch.arange(9).expand(2, 9))
        torch.testing.assert_close(found, network.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
    assert len(model.layers) == 2


def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path), dtype=torch.float32)
    first, second = torch.randint(260, (1, 5)), torch.randint(260, (1, 4))
    with torch.no_grad():
        packed = logits_of(model, torch.cat([first, second], 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))
        alone = [logits_of(model, part, torch.arange(part.shape[1])[None]) for part in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path), dtype=torch.float32).train()
    tokens, calls = torch.randint(260, (2, 9)), []
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))

    def gradients() -> list[Tensor]:
        calls.clear()
        loss = logits_of(model, tokens, torch.arange(9).expand(2, 9)).logsumexp(-1).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    kept = gradients()
    assert len(calls) == 1
    model.checkpoint_activations()
    torch.testing.assert_close(gradients(), kept)
    assert len(calls) == 2


def test_classifier_of_a_language_model_has_a_new_head(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "lm"), dtype=torch.float32, classes=3)
    assert model.is_classifier
    assert model.head.weight.shape == (3, 32)
    again = load_model(save(model.network, tmp_path / "classifier"), dtype=torch.float32, classes=3)
    assert torch.equal(again.head.weight, model.head.weight)


def test_dtype_and_attention_are_taken(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path), dtype=torch.bfloat16, attention="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


REFUSED = {
    "softcap": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, intermediate_size=64, head_dim=8)),
        "final_logit_softcapping 30.0",
    ),
    "scaling": (
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, intermediate_size=64, logits_scaling=8.0)),
        "logits_scaling 8.0",
    ),
    "bert": (lambda: BertLMHeadModel(BertConfig(**SMALL, intermediate_size=64, is_decoder=True)), "BertModel keeps"),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2)),
        "linear_attention",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_heads_and_architectures_are_refused(
    make: Callable[[], PreTrainedModel], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=message):
        load_model(save(make(), tmp_path), dtype=torch.float32, attention="eager")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"no config.json"):
        load_model(tmp_path, dtype=torch.float32)
    make_config().save_pretrained(tmp_path)
    with pytest.raises(TrainError, match="cannot be loaded"):
        load_model(tmp_path, dtype=torch.float32)
    LlamaForCausalLM(make_config()).model.save_pretrained(tmp_path)
    make_config(tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match=r"lacks 1 of the model's weights, lm_head.weight"):
        load_model(tmp_path, dtype=torch.float32)
