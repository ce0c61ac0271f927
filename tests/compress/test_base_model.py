"""The import from GGUF, on a tiny file of the same kind as the real one, with transformers as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from compress.base_model import ImportBaseError, import_base

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, THETA = 32, 4, 2, 48, 2, 1000.0
HEAD = HIDDEN // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def vocabulary() -> tuple[list[str], list[str]]:
    alphabet = sorted(ByteLevel.alphabet())
    merges = ["h e", "Ġ Ġ", "1 2"]  # "1 2" must never be used: digits stand alone
    return SPECIAL + alphabet + [merge.replace(" ", "") for merge in merges], merges


def interleave(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows as llama.cpp keeps them: the two halves of each rotary pair side by side."""
    halves = weights.reshape(heads, 2, -1, weights.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weights.shape)


@pytest.fixture
def model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def source(tmp_path: Path, model: transformers.LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model)


def write_gguf(path: Path, model: transformers.LlamaForCausalLM, pre: str = "smollm") -> Path:
    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            values = interleave(values, HEADS if ".q_proj." in name else KV_HEADS)
        # one 8-bit tensor, as in the real file
        kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.F32
        key = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(key, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_transformers_loads_the_same_model(tmp_path: Path, source: Path, model: transformers.LlamaForCausalLM) -> None:
    import_base(tmp_path / "base", source, report=lambda _: None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded = gguf.dequantize(gguf.quantize(model.model.embed_tokens.weight.detach().numpy(), kind), kind)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(rounded))
        ids = torch.arange(20)[None]
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.max_position_embeddings == 64
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.generation_config.eos_token_id == SPECIAL.index("<|im_end|>")


def test_the_tokenizer_splits_digits_first_and_knows_its_specials(tmp_path: Path, source: Path) -> None:
    import_base(tmp_path / "base", source, report=lambda _: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("he  12<|im_end|>")["input_ids"])
    assert pieces == ["he", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("he said: žluť 🦙")["input_ids"]) == "he said: žluť 🦙"
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 64)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|im_start|>user\nhe<|im_end|>\n"
    assert (tmp_path / "base" / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


def test_a_finished_import_is_not_repeated(tmp_path: Path, source: Path) -> None:
    lines: list[str] = []
    import_base(tmp_path / "base", source, report=lines.append)
    source.unlink()
    import_base(tmp_path / "base", source, report=lines.append)
    assert lines[-1].endswith("is already there")


def test_a_failed_import_leaves_nothing(tmp_path: Path, model: transformers.LlamaForCausalLM) -> None:
    other = write_gguf(tmp_path / "other.gguf", model, pre="llama-bpe")
    with pytest.raises(ImportBaseError, match="not a SmolLM2-Instruct model"):
        import_base(tmp_path / "base", other, report=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "notes.txt").write_text("mine")
    with pytest.raises(ImportBaseError, match="not a complete checkpoint"):
        import_base(tmp_path / "base", source, report=lambda _: None)
    with pytest.raises(ImportBaseError, match="is not a file"):
        import_base(tmp_path / "new", tmp_path / "missing.gguf", report=lambda _: None)
