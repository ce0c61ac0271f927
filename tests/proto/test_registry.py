"""The registry's pointers and history: what is whole is read back, every way to be wrong is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.registry import (
    Movement,
    Pointer,
    RegistryError,
    decode_history,
    decode_pointer,
    encode_movement,
    encode_pointer,
)

DIGEST = "ab" * 32
TIME = "2026-11-21T14:00:00.000Z"

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
texts = st.text(min_size=1)
shares = st.floats(0, 1)
pointers = st.builds(Pointer, version=digests, since=st.just(TIME), by=texts, why=texts, share=shares)
movements = st.builds(
    Movement,
    time=st.just(TIME),
    action=st.sampled_from(["publish", "canary", "promote", "reject", "rollback"]),
    version=digests,
    by=texts,
    why=texts,
    share=shares,
    evidence=st.none() | texts | st.dictionaries(texts, st.integers() | texts, max_size=3),
)


@given(pointers)
def test_a_pointer_is_read_back_as_it_was_written(pointer: Pointer) -> None:
    assert decode_pointer(encode_pointer(pointer), "candidate") == pointer


@given(st.lists(movements, max_size=4), st.binary(max_size=20))
def test_a_history_is_read_back_without_its_torn_end(history: list[Movement], torn: bytes) -> None:
    data = b"".join(map(encode_movement, history))
    assert decode_history(data + torn.replace(b"\n", b"")) == history


@given(movements, st.data())
def test_a_movement_cut_anywhere_was_never_made(movement: Movement, data: st.DataObject) -> None:
    line = encode_movement(movement)
    cut = data.draw(st.integers(0, len(line) - 1))
    assert decode_history(line + line[:cut]) == [movement]


def test_the_files_are_what_the_contract_says() -> None:
    pointer = Pointer(version=DIGEST, since=TIME, by="ann", why="better", share=0.1)
    assert encode_pointer(pointer) == (
        f'{{"version":"{DIGEST}","since":"{TIME}","by":"ann","why":"better","share":0.1}}\n'.encode()
    )
    assert pointer.folder == f"versions/{DIGEST}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "current of the registry is not a pointer"),
        (b"{", "current of the registry is not a pointer"),
        (b"\xff", "current of the registry is not a pointer"),
        (f'{{"version":"{DIGEST}"}}'.encode(), "missing required field `since`"),
        (f'{{"version":"ABC","since":"{TIME}","by":"a","why":"b"}}'.encode(), r"\$.version"),
        (f'{{"version":"{DIGEST}","since":"today","by":"a","why":"b"}}'.encode(), r"\$.since"),
        (f'{{"version":"{DIGEST}","since":"{TIME}","by":"","why":"b"}}'.encode(), r"\$.by"),
        (f'{{"version":"{DIGEST}","since":"{TIME}","by":"a","why":"b","share":1.5}}'.encode(), r"\$.share"),
        (f'{{"version":"{DIGEST}","since":"{TIME}","by":"a","why":"b","x":1}}'.encode(), "unknown field `x`"),
    ],
)
def test_a_wrong_pointer_is_refused_by_its_field(data: bytes, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        decode_pointer(data, "current")


def test_a_wrong_line_of_the_history_is_named_by_its_number() -> None:
    line = encode_movement(Movement(time=TIME, action="publish", version=DIGEST, by="ann", why="first"))
    with pytest.raises(RegistryError, match=r"history.jsonl, line 2 .*Invalid enum value 'destroy'"):
        decode_history(line + line.replace(b"publish", b"destroy"))
    with pytest.raises(RegistryError, match="line 1 "):
        decode_history(b"nonsense\n")
