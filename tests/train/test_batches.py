"""Batches are what the sequences say, and a pure function of the store, the seed and the step."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.train.test_token_store import CONTEXT, RECORDS, open_store, write
from tests.train.tiny import make_config, make_tokenizer
from train.batch import IGNORE, Batch
from train.batches import ExampleBatches, PackedBatches, open_batches
from train.errors import TrainError
from train.samples import Shape
from train.token_store import TokenStore, prepare

ROOT = Path(__file__).parents[2]
PACKED = (Shape.TEXT, Shape.CHAT)


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    named = {"tokens": batch.tokens, "positions": batch.positions, "labels": batch.labels, **batch.extras}
    return {name: value.numpy() for name, value in named.items()}


def assert_same(one: Batch, other: Batch) -> None:
    assert arrays(one).keys() == arrays(other).keys()
    for name, value in arrays(one).items():
        np.testing.assert_array_equal(value, arrays(other)[name], err_msg=name)


def labels_of(store: TokenStore, number: int) -> list[int]:
    tokens, learnt = store.tokens(number), store.learnt(number)
    return [*(int(token) if own else IGNORE for token, own in zip(tokens[1:], learnt[1:], strict=True)), IGNORE]


def split_row(batch: Batch, row: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of the sequences of a row, by where positions start again."""
    starts = [*np.flatnonzero(batch.positions[row].numpy() == 0).tolist(), batch.tokens.shape[1]]
    found = []
    for start, stop in pairwise(starts):
        assert batch.positions[row, start:stop].tolist() == list(range(stop - start))
        found.append((batch.tokens[row, start:stop].tolist(), batch.labels[row, start:stop].tolist()))
    return found


@pytest.mark.parametrize("shape", PACKED)
def test_rows_of_an_epoch_are_exactly_the_sequences(tmp_path: Path, shape: Shape) -> None:
    store = open_store(tmp_path, shape)
    batches = PackedBatches(store, 1, 0)
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    padding = 0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        assert batch.tokens.shape == (1, CONTEXT)
        assert batch.tokens.dtype == batch.positions.dtype == batch.labels.dtype == torch.int64
        for tokens, labels in split_row(batch, 0):
            if set(labels) == {IGNORE}:
                padding += len(tokens)
                assert set(tokens) == {store.info.pad}
            else:
                found[tuple(tokens), tuple(labels)] += 1
    wanted = Counter((tuple(store.tokens(n).tolist()), tuple(labels_of(store, n))) for n in range(len(store)))
    assert found == wanted
    assert padding == batches.steps_per_epoch * CONTEXT - store.info.num_tokens
    assert batches.utilisation == 1 - padding / (batches.steps_per_epoch * CONTEXT)
    assert sum(batches.batch(step).count for step in range(batches.steps_per_epoch)) == store.info.num_learnt


@pytest.mark.parametrize("shape", PACKED)
def test_the_loss_of_packed_rows_is_that_of_the_sequences_alone(tmp_path: Path, shape: Shape) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config()).double().eval()
    store = open_store(tmp_path, shape)
    batches = PackedBatches(store, 3, 0)
    assert batches.utilisation < 1  # there is padding to be led astray by
    numbers = [number for row in batches._order.batch(0) for number in batches._rows[row]]
    assert len(numbers) > 3

    def summed(tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return float(loss)

    batch = batches.batch(0)
    packed = sum(
        summed(batch.tokens[row : row + 1], batch.labels[row : row + 1], batch.positions[row : row + 1])
        for row in range(3)
    )
    alone = 0.0
    for number in numbers:
        tokens = torch.from_numpy(store.tokens(number))[None]
        alone += summed(tokens, torch.tensor([labels_of(store, number)]), torch.arange(tokens.shape[1])[None])
    assert packed == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_together_are_the_whole(tmp_path: Path, shape: Shape, parts: int) -> None:
    batches = open_batches(open_store(tmp_path, shape), 7, 1)
    rows_each = 2 if shape in (Shape.PAIRS, Shape.THUMBS) else 1
    for step in (0, batches.steps_per_epoch - 1):
        whole = arrays(batches.batch(step))
        for part in range(parts):
            numbers = np.arange(7)[part::parts]
            rows = (numbers[:, None] * rows_each + np.arange(rows_each)).ravel()
            for name, value in arrays(batches.batch(step, part, parts)).items():
                wanted = whole[name][rows if name in ("tokens", "positions", "labels") else numbers]
                np.testing.assert_array_equal(value, wanted, err_msg=name)


@pytest.mark.parametrize("shape", Shape)
def test_a_batch_depends_on_nothing_but_its_number(tmp_path: Path, shape: Shape) -> None:
    first = open_batches(open_store(tmp_path, shape), 4, 1)
    seen = [first.batch(step) for step in range(2 * first.steps_per_epoch)]
    again = open_batches(open_store(tmp_path, shape), 4, 1)
    assert again.digest == first.digest
    for step in reversed(range(len(seen))):
        assert_same(again.batch(step), seen[step])
    other = open_batches(open_store(tmp_path, shape), 4, 2)
    assert other.batch(0).tokens.tolist() != seen[0].tokens.tolist()
    assert [arrays(batch)["tokens"].tolist() for batch in seen[: first.steps_per_epoch]] != [
        arrays(batch)["tokens"].tolist() for batch in seen[first.steps_per_epoch :]
    ]


def test_another_process_sees_the_same_batch(tmp_path: Path) -> None:
    store = open_store(tmp_path, Shape.THUMBS)
    (folder,) = (tmp_path / "cache").iterdir()
    program = (
        "import sys, pathlib; from train.batches import open_batches; from train.token_store import TokenStore\n"
        "batch = open_batches(TokenStore(pathlib.Path(sys.argv[1])), 4, 5).batch(17)\n"
        "print(batch.tokens.tolist(), batch.labels.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    batch = open_batches(store, 4, 5).batch(17)
    assert done.stdout.strip() == f"{batch.tokens.tolist()} {batch.labels.tolist()}"


@pytest.mark.parametrize("size", [3, 40, 64, 130])
def test_every_example_comes_once_an_epoch_and_every_batch_is_full(tmp_path: Path, size: int) -> None:
    store = open_store(tmp_path, Shape.PAIRS)  # 40 examples, told apart by their weights
    batches = ExampleBatches(store, size, 0)
    assert batches.steps_per_epoch == -(-40 // size)
    stream = [int(weight) for step in range(45) for weight in batches.batch(step).extras["weight"]]
    assert len(stream) == 45 * size
    epochs = [stream[start : start + 40] for start in range(0, len(stream) - 39, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_pairs_are_two_rows_and_only_answers_are_learnt(tmp_path: Path) -> None:
    store = open_store(tmp_path, Shape.PAIRS)
    batches = ExampleBatches(store, 5, 0)
    batch = batches.batch(3)
    assert batch.tokens.shape[1] % 8 == 0
    assert batch.count == 5
    for example, weight in enumerate(batch.extras["weight"].tolist()):
        for row in range(2):
            (tokens, labels), *padding = split_row(batch, 2 * example + row)
            assert tokens == store.tokens(2 * int(weight) + row).tolist()
            assert labels == labels_of(store, 2 * int(weight) + row)
            assert all(set(ignored) == {IGNORE} for _, ignored in padding)
    halves = list(batch.split(4))
    assert [len(half.tokens) for half in halves] == [4, 4, 2]


def test_thumbs_are_put_beside_the_next_ones_answer(tmp_path: Path) -> None:
    records = [{"prompt": f"ask {n}", "completion": f"answer {n}", "label": n % 3 == 0} for n in range(10)]
    path = write(tmp_path / "a.jsonl", records)
    tokenizer = make_tokenizer()
    store = prepare([path], Shape.THUMBS, tokenizer, 64, tmp_path / "cache")
    batch = ExampleBatches(store, 4, 0).batch(1)

    def told(row: int) -> tuple[str, str]:
        tokens, labels = split_row(batch, row)[0]
        text = tokenizer.decode(tokens)
        answer = text[text.index("answer") :]
        assert tokenizer.decode([label for label in labels if label != IGNORE]) == answer
        return text.removesuffix(answer), answer.removesuffix("<|end|>")

    own = [told(2 * example) for example in range(4)]
    for example in range(4):
        number = int(own[example][1].split()[1])
        assert own[example] == (f"<|user|>ask {number}<|end|><|assistant|>", f"answer {number}")
        assert told(2 * example + 1) == (own[example][0], own[(example + 1) % 4][1])
        assert bool(batch.extras["desirable"][example]) == (number % 3 == 0)
    assert batch.extras["weight"].tolist() == [1.0] * 4


def test_another_ones_answer_is_cut_to_the_context(tmp_path: Path) -> None:
    records = [
        {"prompt": "p" * 20, "completion": "a", "label": True},
        {"prompt": "q", "completion": "b" * 20, "label": False},
    ]
    path = write(tmp_path / "a.jsonl", records)  # fmt: skip
    store = prepare([path], Shape.THUMBS, make_tokenizer(), 28, tmp_path / "cache")
    batch = ExampleBatches(store, 2, 0).batch(0)
    long = int(batch.extras["desirable"].int().argmax())
    ((tokens, labels), *_) = split_row(batch, 2 * long + 1)
    assert make_tokenizer().decode(tokens) == "<|user|>" + "p" * 20 + "<|end|><|assistant|>" + "b" * 5
    assert sum(label != IGNORE for label in labels) == 5
    assert batch.tokens.shape == (4, 32)


def test_classes_name_their_last_token(tmp_path: Path) -> None:
    store = open_store(tmp_path, Shape.CLASSES)
    batch = ExampleBatches(store, 6, 0).batch(0)
    assert batch.tokens.shape == (6, 8)
    assert set(batch.labels.flatten().tolist()) == {IGNORE}
    tokenizer = make_tokenizer()
    for tokens, last, target in zip(batch.tokens, batch.extras["last"], batch.extras["target"], strict=True):
        text = tokenizer.decode(tokens[: last + 1])
        assert {"text": text, "label": "xyz"[target]} in RECORDS[Shape.CLASSES]


@pytest.mark.parametrize(
    ("shape", "size", "seed", "message"),
    [
        (Shape.THUMBS, 1, 0, "give thumbs at least 2"),
        (Shape.TEXT, 0, 0, "size of 1 or more"),
        (Shape.PAIRS, 4, -1, "seed from 0"),
    ],
)
def test_sizes_and_seeds_that_do_not_do(tmp_path: Path, shape: Shape, size: int, seed: int, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        open_batches(open_store(tmp_path, shape), size, seed)


def test_the_digest_follows_the_store(tmp_path: Path) -> None:
    digests: set[Any] = {open_batches(open_store(tmp_path, shape), 4, 0).digest for shape in Shape}
    assert len(digests) == len(Shape)
