"""A transformers model as the training loop sees it: hidden states, a head, and what reads the two."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from train.errors import TrainError

T = TypeVar("T")
Read = Callable[[Tensor, Tensor, Tensor | None], T]
Quantization = Literal["int8", "nf4"]

# What a head may do to its product, and the value with which it does nothing.
HEAD_SETTINGS: Mapping[str, float | None] = {
    "final_logit_softcapping": None,  # Gemma
    "logits_scaling": 1.0,  # Granite
    "logit_scale": 1.0,  # Cohere
    "lm_head_multiplier": 1.0,  # Falcon-H1
    "output_multiplier": 1.0,  # Muse Glimmer
}
# Other layers carry a state along the row, from one packed sequence into the next.
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
CLASSIFIER = "score"  # where transformers keeps a classifier's head


class Model(nn.Module):
    """A causal language model, or a classifier on one.

    `network` is the transformers model and stays what transformers can save. It is trained with the dropout that its
    configuration says (GPT-2's is 0.1; later families have none).
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, positions: Tensor, read: Read[T]) -> T:
        """`read(hidden [rows, length, width], head weight [outputs, width], head bias or None)`.

        tokens and positions [rows, length] int64. Without an attention mask transformers finds in the positions, which
        start again at 0, where each packed sequence begins. The head is read here because FSDP2 has the root's
        parameters whole only within the root's forward.
        """
        hidden = self.network.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        head = self.head
        return read(hidden, head.weight, head.bias)

    @property
    def config(self) -> PreTrainedConfig:
        return self.network.config

    @property
    def head(self) -> nn.Linear:
        """[vocabulary or classes, width]."""
        network: Any = self.network
        head: nn.Linear = getattr(network, CLASSIFIER) if self.is_classifier else network.get_output_embeddings()
        return head

    @property
    def is_classifier(self) -> bool:
        return hasattr(self.network, CLASSIFIER)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder blocks: what FSDP2 shards and activation checkpointing recomputes."""
        return _layers(self.network.base_model)

    def checkpoint_activations(self) -> None:
        """Keep no activations within a block: the backward pass computes each block again."""
        self.network.activation_checkpointing_enable({"use_reentrant": False})


def load_model(
    checkpoint: Path,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    classes: int | None = None,
    quantization: Quantization | None = None,
) -> Model:
    """The checkpoint with its parameters as `dtype`; with `classes`, under a head of so many classes.

    A head that the checkpoint lacks is new and random. `quantization` keeps the blocks' products in 8 bits
    (Dettmers et al. 2022) or as 4-bit NormalFloat (Dettmers et al. 2023), frozen, through bitsandbytes.

    Raises TrainError for what is no checkpoint of a decoder with a linear head.
    """
    if not (checkpoint / "config.json").is_file():
        raise TrainError(f"{checkpoint} has no config.json; give a Hugging Face directory")
    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        if classes is not None:
            config.num_labels = classes
        kind: Any = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
        network, report = kind.from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=_quantization(quantization, dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise TrainError(f"{checkpoint} cannot be loaded as a decoder: {error}") from error
    _check(checkpoint, network)
    missing = {name for name in report["missing_keys"] if classes is None or not name.startswith(CLASSIFIER)}
    if missing:
        raise TrainError(
            f"{checkpoint} lacks {len(missing)} of the model's weights, {sorted(missing)[0]} among them; "
            "give a checkpoint of the whole model"
        )
    return Model(network)


def _quantization(quantization: Quantization | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _check(checkpoint: Path, network: PreTrainedModel) -> None:
    config: Any = network.config
    for name, neutral in HEAD_SETTINGS.items():
        if (value := getattr(config, name, neutral)) not in (neutral, None):
            raise TrainError(
                f"{checkpoint}: {name} {value} changes the logits after the head's product, which training does not "
                f"do; only {neutral} is supported"
            )
    if others := set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS:
        raise TrainError(
            f"{checkpoint}: layers of type {', '.join(sorted(others))} carry a state across packed sequences; "
            f"only {' and '.join(sorted(PACKABLE_LAYERS))} are supported"
        )
    _layers(network.base_model)
    if "position_ids" not in inspect.signature(network.base_model.forward).parameters:
        raise TrainError(f"{checkpoint}: {type(network).__name__} takes no positions, so sequences cannot be packed")


def _layers(backbone: nn.Module) -> nn.ModuleList:
    for name in ("layers", "h"):
        if isinstance(found := getattr(backbone, name, None), nn.ModuleList):
            return found
    raise TrainError(
        f"{type(backbone).__name__} keeps its blocks neither in `layers` nor in `h`, so it is no decoder that training "
        "knows; give one of the families llama, mistral, qwen2, qwen3, gemma3_text, gpt2 or alike"
    )
