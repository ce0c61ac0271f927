"""What is taken for personal data, what is left alone, and that marks stay."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.redaction import KINDS, redact

# What a sentence holds, with the kind that it is taken for.
FOUND = [
    ("ada@example.com", "email"),
    ("first.last+tag@mail.co.uk", "email"),
    ("müller@straße.de", "email"),
    ("8.8.8.8", "ip"),
    ("2606:4700:4700::1111", "ip"),
    ("+49 30 1234567", "phone"),
    ("+1 (415) 555-2671", "phone"),
    ("+14155552671", "phone"),
    ("(415) 555-2671", "phone"),
    ("415-555-2671", "phone"),
    ("4111 1111 1111 1111", "card"),
    ("4111-1111-1111-1111", "card"),
    ("378282246310005", "card"),
    ("5555555555554444", "card"),
    ("2223003122003222", "card"),
    ("6011111111111117", "card"),
    ("30569309025904", "card"),
    ("3530111333300000", "card"),
    ("DE89 3704 0044 0532 0130 00", "iban"),
    ("GB82WEST12345698765432", "iban"),
    ("NO93 8601 1117 947", "iban"),
    ("AKIAIOSFODNN7EXAMPLE", "key"),
    ("ghp_" + "a1B2" * 9, "key"),
    ("sk-ant-api03-" + "x" * 40, "key"),
    ("hf_" + "Ab" * 17, "key"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P", "key"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow==\n-----END RSA PRIVATE KEY-----", "key"),
]
LEFT = [
    "product = a@b.mean(axis=0)",
    "@property.setter",
    "version 3.11.7 of 2024-01-31 12:34:56",
    "v1.2.3.4 and 1.2.3.4.5 are versions",
    "192.168.0.1, 10.0.0.1, 127.0.0.1, 0.0.0.0, ::1, fe80::1, 2001:db8::1",
    "std::vector<int>::iterator and a::b",
    "4111 1111 1111 1112",  # Luhn fails
    "1700000000000",  # milliseconds
    "9111111111111111",  # no brand
    "DE89 3704 0044 0532 0130 01",  # the checksum fails
    "ZZ89370400440532013000",  # no such country
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "x = [+1.5, -2.25, +3.141592653589793]",
    "limit = +1000000",
    "task-force and sk-short",
    "pages 200-300-4000x",
]


@pytest.mark.parametrize(("secret", "kind"), FOUND)
@pytest.mark.parametrize("frame", ["{}", "Write to {}, please.", "({})", "a: {}\nb", '"{}"', "{} IN 2025"])
def test_what_has_a_form_is_found_whole(frame: str, secret: str, kind: str) -> None:
    done = redact(frame.format(secret))
    assert done.text == frame.format(f"<{kind.upper()}>")
    assert done.counts == {kind: 1}


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_it_is_left(text: str) -> None:
    done = redact(text)
    assert (done.text, dict(done.counts)) == (text, {})


def test_several_in_one_text_are_counted_by_kind() -> None:
    ibans = "DE89 3704 0044 0532 0130 00 NO93 8601 1117 947"  # a greedy rule swallows the second
    done = redact(f"a@b.com, c@d.org at 1.1.1.1: {ibans} 4111 1111 1111 1111 123")
    assert done.text == "<EMAIL>, <EMAIL> at <IP>: <IBAN> <IBAN> <CARD> 123"
    assert done.counts == {"email": 2, "ip": 1, "iban": 2, "card": 1}


def test_only_the_kinds_asked_for() -> None:
    assert redact("a@b.com at 8.8.8.8", ["ip"]).text == "a@b.com at <IP>"
    assert redact("a@b.com at 8.8.8.8", []).text == "a@b.com at 8.8.8.8"
    with pytest.raises(KeyError):
        redact("", ["name"])


def luhn_oracle(digits: str) -> bool:
    table = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    return sum(table[int(d)] if i % 2 else int(d) for i, d in enumerate(reversed(digits))) % 10 == 0


@settings(deadline=None)
@given(st.from_regex(r"\A4[0-9]{15}\Z"))
def test_a_card_is_one_by_luhns_checksum_alone(digits: str) -> None:
    assert (redact(digits, ["card"]).text == "<CARD>") == luhn_oracle(digits)


PIECES = st.sampled_from([secret for secret, _ in FOUND] + LEFT + [" ", "", "+", "@", ".", "1", "x", "<EMAIL>"])


@settings(deadline=None)
@given(st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join))
def test_redacting_twice_changes_nothing(text: str) -> None:
    once = redact(text)
    again = redact(once.text)
    assert (again.text, sum(again.counts.values())) == (once.text, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a@", "1.", "+1 ", "4 ", "DE89 ", "f:", "a.", "eyJ.", "-----BEGIN PRIVATE KEY-----"])
def test_hostile_text_takes_no_more_than_its_length(kind: str, unit: str) -> None:
    """Quadratic rules would run into the timeout."""
    redact(unit * (100_000 // len(unit)), [kind])
