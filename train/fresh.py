"""`python -m train init`: a checkpoint with random weights, its shape from one dial.

Depth gives the width (64 a layer), the width the heads (of 64) and the inner size (8/3 of it), as in nanochat; each can
be said by itself.
"""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from train.errors import TrainError
from train.folders import new_folder, refuse_existing

FAMILIES = ("llama", "qwen3")
WIDTH_PER_LAYER = 64
INNER_MULTIPLE = 64  # of the inner size, so that every product has whole blocks
WIDEST_TIED = 2048  # beyond, an output table of its own is a small part of the model
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TABLES, TABLE_STD = ("embed_tokens", "lm_head"), 0.02
ADDED = ("o_proj", "down_proj")  # to the residual stream


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshOptions:
    """Settings of `python -m train init`; 0 where another number follows from the depth."""

    family: str = "llama"
    depth: int = 12
    width: int = 0
    head_size: int = 64
    kv_heads: int = 0
    inner: int = 0
    vocabulary: int = 0
    context: int = 2048
    rope_theta: float = 10000.0
    tied: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TrainError for numbers that do not go together."""
        if self.family not in FAMILIES:
            raise TrainError(f"--family {self.family} is unknown; give one of {', '.join(FAMILIES)}")
        zero = ("width", "kv_heads", "inner", "vocabulary", "seed")
        least_of = {"depth": 1, "head_size": 2, "context": 2, "rope_theta": 1} | dict.fromkeys(zero, 0)
        for name, least in least_of.items():
            if (value := getattr(self, name)) < least:
                raise TrainError(f"--{name.replace('_', '-')} {value} is too small; give at least {least}")
        if self.head_size % 2:
            raise TrainError(f"--head-size {self.head_size} is odd, and the rotary embedding turns pairs; give 64")
        if self.hidden_size % self.head_size:
            raise TrainError(f"--width {self.hidden_size} is no multiple of --head-size {self.head_size}")
        if self.num_heads % self.num_kv_heads:
            raise TrainError(
                f"--kv-heads {self.num_kv_heads} does not divide the {self.num_heads} heads; give a divisor"
            )

    @property
    def hidden_size(self) -> int:
        return self.width or self.depth * WIDTH_PER_LAYER

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_size

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.num_heads

    @property
    def intermediate_size(self) -> int:
        return self.inner or math.ceil(self.hidden_size * 8 / 3 / INNER_MULTIPLE) * INNER_MULTIPLE

    @property
    def ties(self) -> bool:
        return self.hidden_size <= WIDEST_TIED if self.tied is None else self.tied


def make_checkpoint(target: Path, tokenizer: Path, options: FreshOptions) -> PreTrainedModel:
    """Write the Hugging Face directory `target`, which must not be there; it is whole or not there.

    Raises TrainError for a tokenizer that cannot be read or has more tokens than the vocabulary.
    """
    refuse_existing(target)
    if not (tokenizer / "tokenizer.json").is_file():
        raise TrainError(f"--tokenizer {tokenizer} has no tokenizer.json; give a directory with a fast tokenizer")
    try:
        words: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:  # of many kinds, from transformers and from tokenizers
        raise TrainError(f"--tokenizer {tokenizer} cannot be read: {error}") from error
    network = make_network(options, words)
    with new_folder(target) as made:
        network.save_pretrained(made)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, made / name)
    return network


def make_network(options: FreshOptions, tokenizer: Any) -> PreTrainedModel:
    tokens = max(tokenizer.get_vocab().values()) + 1
    if 0 < options.vocabulary < tokens:
        raise TrainError(f"--vocabulary {options.vocabulary} is less than the tokenizer's {tokens} tokens; give more")
    ends = end_tokens(tokenizer)
    config = AutoConfig.for_model(
        options.family,
        vocab_size=options.vocabulary or tokens,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.depth,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_kv_heads,
        head_dim=options.head_size,
        max_position_embeddings=options.context,
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        tie_word_embeddings=options.ties,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if ends else None,
    )
    maker: Any = AutoModelForCausalLM
    network: PreTrainedModel = maker.from_config(config, dtype=torch.float32)
    generation: Any = GenerationConfig
    network.generation_config = generation(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends or None)
    initialize(network, torch.Generator().manual_seed(options.seed))
    return network


def end_tokens(tokenizer: Any) -> list[int]:
    """The tokenizer's end of text, and what its chat template ends an answer with, if that is another token."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        except TemplateError as error:
            raise TrainError(f"the tokenizer's chat template fails on a question and its answer: {error}") from error
        rendered = tokenizer.encode(text, add_special_tokens=False)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends += [number for number in reversed(rendered) if number in special][:1]
    return list(dict.fromkeys(ends))


def initialize(network: PreTrainedModel, generator: torch.Generator) -> None:
    """Tables N(0, 0.02^2), products N(0, 1 / inputs), and zero for those that add to the residual stream.

    So a new model is its tables alone. After 150 steps of 8 layers of width 128 on bytes (AdamW, rate 0.002) the loss
    was 2.14; with GPT-2's 0.02 everywhere, divided by sqrt(2 depth) where it is added, 2.25; with 1 / inputs
    divided likewise 2.48. With Muon (rate 0.006): 2.00, 2.07, 2.04.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            layer = name.rsplit(".", 2)[-2]
            if parameter.dim() < 2:  # norms begin as ones, and biases, if there are any, as zeros
                continue
            if layer in ADDED:
                parameter.zero_()
            else:
                std = TABLE_STD if layer in TABLES else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)


def configure(parser: argparse.ArgumentParser) -> None:
    default = {item.name: item.default for item in fields(FreshOptions)}
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint directory to make")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with a tokenizer")
    parser.add_argument("--family", choices=FAMILIES, default=default["family"], help="(default: %(default)s)")
    for name, kind, text in (
        ("depth", int, "layers"),
        ("width", int, f"hidden size; 0: {WIDTH_PER_LAYER} a layer"),
        ("head_size", int, "size of a head"),
        ("kv_heads", int, "heads of keys and values; 0: as many as of queries"),
        ("inner", int, f"inner size of the MLP; 0: 8/3 of the width, up to a multiple of {INNER_MULTIPLE}"),
        ("vocabulary", int, "rows of the embedding; 0: the tokenizer's tokens"),
        ("context", int, "longest sequence in tokens"),
        ("rope_theta", float, "base of the rotary embedding"),
        ("seed", int, "of the random weights"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default[name], help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--tied",
        action=argparse.BooleanOptionalAction,
        default=default["tied"],
        help=f"one table for embedding and head (default: to a width of {WIDEST_TIED})",
    )


def run(args: argparse.Namespace) -> int:
    options = FreshOptions(**{item.name: getattr(args, item.name) for item in fields(FreshOptions)})
    network = make_checkpoint(args.output, args.tokenizer, options)
    config: Any = network.config
    table = config.vocab_size * config.hidden_size
    where = "the table of embedding and head" if options.ties else "the embedding and as many in the head"
    print(
        f"{args.output}: {options.family}, {options.depth} layers of width {config.hidden_size}, inner size "
        f"{config.intermediate_size}, {options.num_heads} heads ({options.num_kv_heads} of keys and values), context "
        f"{options.context}: {network.num_parameters():,} parameters, {table:,} of them in {where}"
    )
    return 0
