"""Parameters of a decoder and the arithmetic of training it, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.errors import TrainError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2")
CHINCHILLA = 20  # tokens a parameter at which compute is best spent (Hoffmann et al. 2022, table 3)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the formulas take from a configuration. `inner` is the width between the products of the MLP."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    tied: bool
    learned_positions: int = 0
    gated: bool = True
    head_norms: bool = False  # of q and k, as in Qwen3
    post_norms: bool = False  # behind attention and the MLP too, as in Gemma 3
    layer_norm: bool = False  # with a bias, rather than RMSNorm
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int = 0  # tokens that a layer with a sliding window sees
    windowed_layers: int = 0

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters. `active` are those in matrix products, in which every token takes part: the N of 6N."""

    total: int
    embedding: int  # tables that are looked up
    layer: int  # one of the layers
    active: int


def dimensions(config: Any) -> Dimensions:
    """From a configuration of transformers. Raises TrainError for a family whose parameters we cannot count."""
    family = config.model_type
    if family not in FAMILIES:
        raise TrainError(f"model_type {family!r} is not known; known are {', '.join(FAMILIES)}")
    width, heads = config.hidden_size, config.num_attention_heads
    common = {
        "family": family,
        "layers": config.num_hidden_layers,
        "width": width,
        "heads": heads,
        "vocabulary": config.vocab_size,
        "tied": config.tie_word_embeddings,
    }
    if family == "gpt2":
        return Dimensions(
            **common,
            kv_heads=heads,
            head_size=width // heads,
            inner=config.n_inner or 4 * width,
            learned_positions=config.max_position_embeddings,
            gated=False,
            layer_norm=True,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
        )
    bias = bool(getattr(config, "attention_bias", False))
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return Dimensions(
        **common,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim if getattr(config, "head_dim", None) else width // heads,
        inner=config.intermediate_size,
        head_norms=family in ("qwen3", "gemma3_text"),
        post_norms=family == "gemma3_text",
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        window=window,
        windowed_layers=kinds.count("sliding_attention") if window else 0,
    )


def parameters(config: Any) -> Counts:
    """Of a configuration, or of Dimensions; exactly those of the model that transformers makes of it."""
    shape = config if isinstance(config, Dimensions) else dimensions(config)
    norm = shape.width * (2 if shape.layer_norm else 1)
    up = 2 if shape.gated else 1
    matrices = layer_matrices(shape)
    biases = shape.qkv_bias * (shape.queries + 2 * shape.keys) + shape.output_bias * shape.width
    biases += shape.mlp_bias * (up * shape.inner + shape.width)
    layer = matrices + biases + (4 if shape.post_norms else 2) * norm + shape.head_norms * 2 * shape.head_size
    table = shape.vocabulary * shape.width
    embedding = table + shape.learned_positions * shape.width
    return Counts(
        total=shape.layers * layer + embedding + norm + (0 if shape.tied else table),
        embedding=embedding,
        layer=layer,
        active=shape.layers * matrices + table,
    )


def layer_matrices(shape: Dimensions) -> int:
    """Parameters in the products of one layer."""
    attention = shape.width * (shape.queries + 2 * shape.keys) + shape.queries * shape.width
    return attention + (3 if shape.gated else 2) * shape.width * shape.inner


def flops_per_token(config: Any, context: int) -> float:
    """Of training, forward and backward, in rows of `context` tokens; multiplications and additions count each.

    6N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B): N active parameters, L layers of H heads of size Q, T
    tokens that are attended to, all of the row as if attention were not causal, as is the custom for MFU; in a
    layer with a sliding window at most the window. Chinchilla's appendix F differs by the softmax and the embedding's
    look-up as a product, a few percent.
    """
    shape = config if isinstance(config, Dimensions) else dimensions(config)
    attended = (shape.layers - shape.windowed_layers) * context + shape.windowed_layers * min(shape.window, context)
    return 6.0 * parameters(shape).active + 12.0 * shape.queries * attended
