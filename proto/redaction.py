"""Personal data and secrets in text, found by their form and replaced by a mark such as `<EMAIL>`.

Training redacts what it curates, serving what it logs, with these same rules. What has a checksum (cards, IBANs) is
checked, so few other numbers are taken for one. Names and postal addresses have no form and are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]

# Known prefixes only: a rule on randomness would take every digest and every base64 picture for a secret.
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY-----[A-Za-z0-9+/=:,\s-]{0,8192}?"
    r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY-----"
    r"|(?<![\w-])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255}"
    r"|glpat-[\w-]{20,64}"  # GitLab
    r"|sk-[\w-]{20,256}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,256}"  # OpenAI, Anthropic and others; Stripe
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,256}"  # Slack
    r"|AIza[\w-]{35}"  # Google
    r"|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,512}"
    r"|eyJ[\w-]{8,2048}\.eyJ[\w-]{8,4096}\.[\w-]{8,2048}"  # a JSON web token
    r")(?![\w-])"
)
# A bracket after it: a call on a product of matrices, `a@b.mean(...)`.
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w(])")
_IBAN_HEAD = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?= ?[A-Z0-9])")
_CARD_HEAD = re.compile(r"(?<![\w.+-])[2-6](?=[0-9])")
_CARD_BRAND = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}"  # Discover, Diners
    r"|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"  # JCB, UnionPay
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{8,15}"  # Maestro
)
_IP4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.[0-9])")
_IP6_GLOBAL = ipaddress.ip_network(
    "2000::/3"
)  # all that is given out; the rest is reserved, private or hexadecimal prose
# International with a plus, or North American with its three groups; other national forms look like any number. A
# second number right after an international one may be taken with it: the length of these is not fixed.
_PHONE = re.compile(
    r"(?<![\w+])\+[1-9](?:[ ./-]?\(?[0-9]|\)[ ./-]?[0-9]){7,14}(?![\w.]?[0-9])"
    r"|(?<![\w.+/-])(?:1[ .-])?"
    r"(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-]|[2-9][0-9]{2}(?P<mark>[.-])[2-9][0-9]{2}(?P=mark))"
    r"[0-9]{4}(?![\w-])"
)
_SIGNED_NUMBER = re.compile(r"\+[0-9]{1,9}(?:\.[0-9]+)?")

# Length of an IBAN by country, from SWIFT's registry.
_IBAN_LENGTHS = {
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})([0-9]{2})",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 "
        "EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 "
        "KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 "
        "PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 "
        "VA22 VG24 XK20 YE30",
    )
}


@dataclass(frozen=True, slots=True)
class Redacted:
    """The text with marks, and how many of each kind were found."""

    text: str
    counts: Counter[str]


def redact(text: str, kinds: Sequence[str] | None = None) -> Redacted:
    """Replace what is found of `kinds` (default: all of KINDS). Redacting the result again changes nothing.

    Raises KeyError for a kind that is not in KINDS.
    """
    finders = {kind: _FINDERS[kind] for kind in (KINDS if kinds is None else kinds)}
    counts: Counter[str] = Counter()
    # Again until nothing is found: a mark ends a word, so what stood beside it may have a form only now.
    while found := _find(text, finders):
        pieces = []
        position = 0
        for start, end, kind in found:
            pieces += [text[position:start], f"<{kind.upper()}>"]
            position = end
            counts[kind] += 1
        text = "".join([*pieces, text[position:]])
    return Redacted(text, counts)


def _find(text: str, finders: Mapping[str, Finder]) -> list[tuple[int, int, str]]:
    """Spans in order of place; where two overlap, the kind that comes first has it."""
    found = []
    taken: set[int] = set()
    for kind, finder in finders.items():
        for start, end in finder(text):
            if taken.isdisjoint(range(start, end)):
                taken.update(range(start, end))
                found.append((start, end, kind))
    return sorted(found)


def _keys(text: str) -> Iterator[Span]:
    return (match.span() for match in _KEY.finditer(text))


def _emails(text: str) -> Iterator[Span]:
    return (match.span() for match in _EMAIL.finditer(text)) if "@" in text else iter(())


def _ibans(text: str) -> Iterator[Span]:
    """ISO 13616: the country's length, and 1 modulo 97 with the first four at the end and letters as 10 to 35."""
    for head in _IBAN_HEAD.finditer(text):
        length = _IBAN_LENGTHS.get(head[0][:2])
        if length and (body := _exactly("[A-Z0-9]", " ?", length - 4).match(text, head.end())):
            number = "".join((body[0] + head[0]).split())
            if int("".join(str(int(char, 36)) for char in number)) % 97 == 1:
                yield head.start(), body.end()


def _cards(text: str) -> Iterator[Span]:
    """ISO 7812: a brand's first digits and length, and Luhn's checksum."""
    for head in _CARD_HEAD.finditer(text):
        for length in range(19, 12, -1):
            body = _exactly("[0-9]", "[ -]?", length - 1).match(text, head.end())
            if body:
                digits = "".join(char for char in head[0] + body[0] if char.isdigit())
                if _CARD_BRAND.fullmatch(digits) and _luhn(digits):
                    yield head.start(), body.end()
                    break


def _ips(text: str) -> Iterator[Span]:
    """Public addresses. Private, local and documentation ones name nobody and mean something in code."""
    for match in _IP4.finditer(text):
        try:
            if ipaddress.IPv4Address(match[0]).is_global:
                yield match.span()
        except ValueError:
            continue
    for match in _IP6.finditer(text):
        try:
            address = ipaddress.IPv6Address(match[0])
        except ValueError:
            continue
        if address.is_global and address in _IP6_GLOBAL:
            yield match.span()


def _phones(text: str) -> Iterator[Span]:
    return (match.span() for match in _PHONE.finditer(text) if not _SIGNED_NUMBER.fullmatch(match[0]))


def _luhn(digits: str) -> bool:
    doubled = [2 * int(digit) for digit in digits[-2::-2]]
    return (sum(number // 10 + number % 10 for number in doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


@cache
def _exactly(char: str, separator: str, count: int) -> re.Pattern[str]:
    return re.compile(rf"(?:{separator}{char}){{{count}}}(?![A-Za-z0-9])")


_FINDERS: dict[str, Finder] = {
    "key": _keys,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
}
KINDS = tuple(_FINDERS)
