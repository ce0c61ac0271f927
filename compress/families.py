"""The decoder families: what tells one architecture from the next, as data.

A `Family` names the tensors and the parts that differ; a `Decoder` adds the numbers that one configuration gives.
To add a family, describe it here and add its tiny model to the tests: nothing else branches on a family's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.checkpoint import Checkpoint, CheckpointError
from compress.configuration import Windows, eos_of, ropes_of, window_of
from proto.manifest import Architecture

# The names that most configurations give to the numbers; a family overrides those that it calls otherwise.
LLAMA_KEYS: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "max_position": "max_position_embeddings",
    "epsilon": "rms_norm_eps",
    "activation": "hidden_act",
}
GEMMA3_KEYS: Mapping[str, str] = {**LLAMA_KEYS, "activation": "hidden_activation"}
GPT2_KEYS: Mapping[str, str] = {
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position": "n_positions",
    "epsilon": "layer_norm_epsilon",
    "activation": "activation_function",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Modules are templates over the layer `{i}`, without the prefix and without `.weight` or `.bias`."""

    name: str  # config.json's model_type
    prefixes: tuple[str, ...] = ("model.",)  # tried in this order: some checkpoints are saved without one
    embedding: str = "embed_tokens"
    positions: str | None = None  # learned position embeddings; None: rotary
    head: str = "lm_head"  # has no prefix
    norm: Literal["rms", "layer"] = "rms"
    attention_norm: str = "layers.{i}.input_layernorm"
    mlp_norm: str = "layers.{i}.post_attention_layernorm"
    attention_post_norm: str | None = None  # of what attention adds to the residual stream
    mlp_post_norm: str | None = None
    final_norm: str = "norm"
    norm_offset: float = 0.0  # what a norm multiplies by is its weight and this
    scaled_embedding: bool = False  # token rows are multiplied by the square root of their length
    qkv: tuple[str, ...] = ("layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.v_proj")
    q_norm: str | None = None  # RMSNorm per head, before the rotary embedding
    k_norm: str | None = None
    o: str = "layers.{i}.self_attn.o_proj"
    up: tuple[str, ...] = ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj")  # two modules: a gated MLP
    down: str = "layers.{i}.mlp.down_proj"
    inputs_first: bool = False  # matrices are [in, out] (GPT-2's Conv1D), not [out, in]
    biases: frozenset[str] = frozenset()  # the products that always have one
    bias_switches: Mapping[str, frozenset[str]] = field(default_factory=dict)  # config key -> products it gives one
    window: Windows = "never"
    tied: bool = False  # where the configuration does not say
    keys: Mapping[str, str] = field(default_factory=lambda: LLAMA_KEYS)
    required: Mapping[str, object] = field(default_factory=dict)  # config values, where given, that alone are built

    @property
    def gated(self) -> bool:
        return len(self.up) == 2


ATTENTION_BIAS: Mapping[str, frozenset[str]] = {"attention_bias": frozenset({"qkv", "o"})}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama", bias_switches={**ATTENTION_BIAS, "mlp_bias": frozenset({"gate_up", "down"})}),
        Family(name="mistral", window="every layer"),
        Family(name="qwen2", window="switched", biases=frozenset({"qkv"})),
        Family(
            name="qwen3",
            window="switched",
            bias_switches=ATTENTION_BIAS,
            q_norm="layers.{i}.self_attn.q_norm",
            k_norm="layers.{i}.self_attn.k_norm",
        ),
        Family(
            name="gemma3_text",
            norm_offset=1.0,
            scaled_embedding=True,
            window="by layer",
            bias_switches=ATTENTION_BIAS,
            q_norm="layers.{i}.self_attn.q_norm",
            k_norm="layers.{i}.self_attn.k_norm",
            mlp_norm="layers.{i}.pre_feedforward_layernorm",
            attention_post_norm="layers.{i}.post_attention_layernorm",
            mlp_post_norm="layers.{i}.post_feedforward_layernorm",
            tied=True,
            keys=GEMMA3_KEYS,
            required={
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "use_bidirectional_attention": False,
            },
        ),
        Family(
            name="gpt2",
            prefixes=("transformer.", ""),
            embedding="wte",
            positions="wpe",
            norm="layer",
            attention_norm="h.{i}.ln_1",
            mlp_norm="h.{i}.ln_2",
            final_norm="ln_f",
            qkv=("h.{i}.attn.c_attn",),
            o="h.{i}.attn.c_proj",
            up=("h.{i}.mlp.c_fc",),
            down="h.{i}.mlp.c_proj",
            inputs_first=True,
            biases=frozenset({"qkv", "o", "fc", "down"}),
            tied=True,
            keys=GPT2_KEYS,
            required={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A family with the numbers of one checkpoint."""

    family: Family
    prefix: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    epsilon: float
    activation: str
    tied: bool
    biases: frozenset[str]
    windows: tuple[int | None, ...]  # by layer: keys that a query sees, itself included; None: all
    rope: Mapping[str, Any]  # empty with learned positions
    local_rope: Mapping[str, Any]  # of the layers with a window, where it is another; else empty
    attention_scale: float  # of the scores
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def up(self) -> str:
        """The name of the MLP's first product."""
        return "gate_up" if self.family.gated else "fc"

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of a layer's products, in the order of the graph."""
        return ("qkv", "o", self.up, "down")

    @property
    def products(self) -> tuple[str, ...]:
        """The names of all matrix products, in the order of the graph."""
        return (*(f"layers.{i}.{role}" for i in range(self.num_layers) for role in self.roles), "head")

    @property
    def embedding_scale(self) -> float:
        """What token rows are multiplied by, before the first layer."""
        return math.sqrt(self.hidden_size) if self.family.scaled_embedding else 1.0

    @property
    def ropes(self) -> Mapping[str, Mapping[str, Any]]:
        """The rotary embeddings' settings, by the names of their tables."""
        return {name: rope for name, rope in (("rope", self.rope), ("rope.local", self.local_rope)) if rope}

    def rope_of(self, layer: int) -> str:
        """The name of a layer's rotary tables; "" with learned positions."""
        local = self.local_rope and self.windows[layer] is not None
        return "rope.local" if local else "rope" if self.rope else ""

    def check_window(self, window: int) -> None:
        """Raises ValueError for more tokens of context than the model has."""
        if window > self.max_position:
            raise ValueError(f"--window {window} is beyond the model's {self.max_position} tokens; give less")

    def shape(self, role: str) -> tuple[int, int]:
        """Outputs N and inputs K of `qkv`, `o`, `gate_up` or `fc`, `down`, or `head`."""
        width = self.num_heads * self.head_size
        shapes = {
            "qkv": (width + 2 * self.num_kv_heads * self.head_size, self.hidden_size),
            "o": (self.hidden_size, width),
            self.up: (self.intermediate_size * len(self.family.up), self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "head": (self.vocab_size, self.hidden_size),
        }
        return shapes[role]

    def modules(self, role: str) -> tuple[str, ...]:
        """Templates of the modules that are fused into a layer's product, in the order of its outputs."""
        family = self.family
        return {"qkv": family.qkv, "o": (family.o,), self.up: family.up, "down": (family.down,)}[role]

    def parts(self, role: str) -> int:
        """How many products are fused one above the other such that the native operator pads each by itself."""
        return len(self.family.up) if role == self.up else 1

    def architecture(self, max_context: int) -> Architecture:
        return Architecture(
            family=self.family.name,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_context=max_context,
            bos_token_id=self.bos_token_id,
            eos_token_ids=list(self.eos_token_ids),
        )


def describe(checkpoint: Checkpoint) -> Decoder:
    """Read the numbers from a checkpoint's configuration. Raises CheckpointError for what cannot be built."""
    config = checkpoint.config
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{checkpoint.path}: model_type {config.get('model_type')!r} is not supported. "
            f"Supported are {', '.join(sorted(FAMILIES))}; a new one is a few lines in compress/families.py."
        )
    required = {**family.required, "quantization_config": None}
    for key, value in required.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{checkpoint.path}: {key} {config[key]!r} is not supported, only {value!r}.")

    def number(key: str) -> Any:
        name = family.keys.get(key, key)
        if config.get(name) is None:
            raise CheckpointError(f"{checkpoint.path}: config.json does not give {name}. Save the checkpoint again.")
        return config[name]

    hidden_size, num_heads, num_layers = number("hidden_size"), number("num_heads"), number("num_layers")
    # GPT-2 leaves the inner size out when it is four times the hidden size.
    inner = config.get(family.keys["intermediate_size"]) or (4 * hidden_size if family.name == "gpt2" else None)
    head_size = config.get("head_dim") or hidden_size // num_heads
    rope, local_rope = ({}, {}) if family.positions else ropes_of(config)
    prefixes = [prefix for prefix in family.prefixes if f"{prefix}{family.embedding}.weight" in checkpoint.names]
    return Decoder(
        family=family,
        prefix=prefixes[0] if prefixes else family.prefixes[0],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_size=head_size,
        hidden_size=hidden_size,
        intermediate_size=inner or number("intermediate_size"),
        vocab_size=number("vocab_size"),
        max_position=number("max_position"),
        epsilon=number("epsilon"),
        activation=number("activation"),
        tied=config.get("tie_word_embeddings", family.tied),
        biases=family.biases.union(*(roles for key, roles in family.bias_switches.items() if config.get(key))),
        windows=tuple(window_of(family.window, config, layer) for layer in range(num_layers)),
        rope=rope,
        local_rope=local_rope,
        attention_scale=(config.get("query_pre_attn_scalar") or head_size) ** -0.5,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=eos_of(config, checkpoint.generation),
    )
