import argparse
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.checkpoint import Checkpoint
from compress.families import describe
from tests.train.tiny import make_tokenizer
from train import fresh
from train.errors import TrainError
from train.fresh import FAMILIES, FreshOptions, make_checkpoint


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(directory)
    return directory


def test_depth_gives_the_shape() -> None:
    options = FreshOptions(depth=12)
    assert (options.hidden_size, options.num_heads, options.num_kv_heads, options.intermediate_size) == (
        768,
        12,
        12,
        2048,
    )
    assert options.ties
    assert not FreshOptions(depth=33).ties
    assert FreshOptions(depth=33, tied=True).ties
    said = FreshOptions(depth=2, width=384, head_size=96, kv_heads=2, inner=512)
    assert (said.hidden_size, said.num_heads, said.num_kv_heads, said.intermediate_size) == (384, 4, 2, 512)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_loads_and_can_be_compressed(family: str, tokenizer: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "model"
    options = FreshOptions(family=family, depth=2, kv_heads=1, context=128, rope_theta=500.0)
    made = make_checkpoint(target, tokenizer, options)
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(target)
    for found, wanted in zip(loaded.parameters(), made.parameters(), strict=True):
        assert torch.equal(found, wanted)
    words = AutoTokenizer.from_pretrained(target)
    assert words.get_vocab() == make_tokenizer().get_vocab()
    assert words.chat_template == make_tokenizer().chat_template
    assert loaded.generation_config.eos_token_id == [0]

    decoder = describe(Checkpoint(target))
    assert (decoder.num_layers, decoder.num_heads, decoder.num_kv_heads, decoder.head_size) == (2, 2, 1, 64)
    assert (decoder.vocab_size, decoder.max_position, decoder.tied) == (260, 128, True)
    assert decoder.rope["rope_theta"] == 500.0
    assert decoder.windows == (None, None)
    assert decoder.eos_token_ids == (0,)


def test_seed_gives_the_weights(tokenizer: Path, tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> bytes:
        torch.manual_seed(torch.seed() % 1000)  # what others drew does not count
        make_checkpoint(tmp_path / name, tokenizer, FreshOptions(depth=1, seed=seed))
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert digest("a", 1) == digest("b", 1)
    assert digest("c", 2) != digest("a2", 1)


def test_an_answers_end_is_an_end_too(tmp_path: Path) -> None:
    words = make_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    words.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|turn|>\n{% endfor %}"
    words.save_pretrained(tmp_path / "tokenizer")
    made = make_checkpoint(tmp_path / "model", tmp_path / "tokenizer", FreshOptions(depth=1))
    assert made.generation_config.eos_token_id == [0, 260]
    assert made.config.vocab_size == 261


def test_command_prints_the_parameters(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    fresh.configure(parser)
    flags = ["-o", str(tmp_path / "model"), "--tokenizer", str(tokenizer), "--depth", "2", "--no-tied"]
    assert fresh.run(parser.parse_args(flags)) == 0
    table, layer = 260 * 128, 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
    assert f"{2 * table + 2 * layer + 128:,} parameters, {table:,} of them in the embedding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "bert"}, "--family bert is unknown"),
        ({"depth": 0}, "--depth 0 is too small; give at least 1"),
        ({"width": 100}, "--width 100 is no multiple of --head-size 64"),
        ({"kv_heads": 5}, "--kv-heads 5 does not divide the 12 heads"),
        ({"head_size": 33, "width": 66}, "--head-size 33 is odd"),
        ({"vocabulary": -1}, "--vocabulary -1 is too small"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        FreshOptions(**settings)  # type: ignore[arg-type]


def test_bad_tokenizers_and_outputs_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(TrainError, match="--vocabulary 259 is less than the tokenizer's 260 tokens"):
        make_checkpoint(target, tokenizer, FreshOptions(depth=1, vocabulary=259))
    with pytest.raises(TrainError, match=r"has no tokenizer.json"):
        make_checkpoint(target, tmp_path, FreshOptions(depth=1))
    with pytest.raises(TrainError, match="exists; remove it"):
        make_checkpoint(tokenizer, tokenizer, FreshOptions(depth=1))
    assert not target.exists()
    made = make_checkpoint(target, tokenizer, FreshOptions(depth=1, vocabulary=320))
    assert made.get_input_embeddings().weight.shape == (320, 64)


def test_text_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TrainError, match="cannot be read"):
        make_checkpoint(tmp_path / "model", tmp_path, FreshOptions(depth=1))


def test_weights_begin_as_tables_alone(tokenizer: Path, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "model", tokenizer, FreshOptions(depth=4, tied=False))
    weights = {name: parameter.detach() for name, parameter in made.named_parameters()}
    assert not weights["model.layers.1.self_attn.o_proj.weight"].any()
    assert not weights["model.layers.1.mlp.down_proj.weight"].any()
    assert float(weights["model.layers.1.mlp.up_proj.weight"].std()) == pytest.approx(256**-0.5, rel=0.02)
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        assert float(weights[table].std()) == pytest.approx(0.02, rel=0.02)
    tokens = torch.randint(260, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = made(tokens, labels=tokens).loss
    assert float(loss) == pytest.approx(math.log(260), abs=0.1)
