"""`python -m train tokenizer`: byte-level BPE (Sennrich et al. 2016; on bytes, Radford et al. 2019) from records."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from train.content import text_of
from train.data import SkipReport, find_sources, read
from train.errors import TrainError
from train.flags import add_flags, from_flags, option
from train.folders import new_folder
from train.tables import aligned

END_OF_TEXT, START_OF_TURN, END_OF_TURN = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALLEST = 256 + len(SPECIAL)  # all bytes
LARGEST = 1_000_000
MEASURED_BYTES = 10_000_000  # of a text; the rest would not change the third digit
TEXTS_AT_ONCE = 256

# Qwen2's, which is GPT-4's with each digit alone: small models add better when a number is always cut the same way,
# and no part of a small vocabulary goes to the thousand numbers of three digits. Code profits from the rest: runs of
# blanks are one piece but for the last, which goes with the word after it; a bracket or a dot begins a word.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# ChatML
CHAT_TEMPLATE = (
    f"{{% for message in messages %}}{START_OF_TURN}{{{{ message['role'] }}}}\n"
    f"{{{{ message['content'] }}}}{END_OF_TURN}\n"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{START_OF_TURN}assistant\n{{% endif %}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    vocab_size: int = option(16384, "tokens, with all bytes and the special ones", least=SMALLEST, most=LARGEST)
    held_out: tuple[Path, ...] = option((), "files and folders to measure on as well, never trained on")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, nargs="+", help="files and folders of records")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Hugging Face tokenizer directory to make")
    add_flags(parser, Options)


def run(args: argparse.Namespace) -> int:
    options = from_flags(Options, args)
    with new_folder(args.output) as folder:
        tokenizer = train_tokenizer(texts(args.data, "train"), options.vocab_size)
        save(tokenizer, folder)
        rows = [["training text", *_figures(measure(tokenizer, texts(args.data, "measure")))]]
        if options.held_out:
            rows.append(["held-out text", *_figures(measure(tokenizer, texts(options.held_out, "measure")))])
    print(aligned(("", "bytes", "tokens", "bytes a token"), rows))
    return 0


def texts(paths: Iterable[Path], what: str) -> Iterator[str]:
    """The texts of records in the columns that we know. Raises DataError if nothing can be read."""
    paths = list(paths)
    total = sum(source.num_bytes for path in paths for source in find_sources(path))
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        for record in read(paths, SkipReport(), bar.update):
            if text := text_of(record.columns):
                yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The special tokens come first, then bytes, then merges in the order in which they were learnt.

    Raises TrainError if the texts do not give so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise TrainError(
            f"--vocab-size {vocab_size} is more than the text gives, {found} tokens; "
            f"give more text, or --vocab-size {found}"
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """The files that transformers reads, and of them those that compress and serve copy."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that older versions of transformers know too
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """(bytes, tokens) of the first MEASURED_BYTES."""
    num_bytes = num_tokens = 0
    waiting: list[str] = []

    def encode() -> int:
        found: list[Any] = tokenizer.encode_batch(waiting, add_special_tokens=False)
        waiting.clear()
        return sum(len(item.ids) for item in found)

    for text in texts:
        num_bytes += len(text.encode())
        waiting.append(text)
        if len(waiting) == TEXTS_AT_ONCE:
            num_tokens += encode()
        if num_bytes >= MEASURED_BYTES:
            break
    return num_bytes, num_tokens + encode()


def _figures(measured: tuple[int, int]) -> list[str]:
    num_bytes, num_tokens = measured
    return [f"{num_bytes:,}", f"{num_tokens:,}", f"{num_bytes / max(1, num_tokens):.3f}"]
