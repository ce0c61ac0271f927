"""Which requests count for an objective, and which are good."""

from __future__ import annotations

import pytest

from serve.request import FinishReason
from serve.slo import Objectives
from tests.serve.test_metrics import request

# The request of these tests has its first token 3 s after it arrived, and then one every 0.5 s.
PASSED, FAILED = True, False


@pytest.mark.parametrize(
    ("ttft_seconds", "tpot_seconds", "expected"),
    [
        (3.0, 0.5, {"availability": PASSED, "ttft": PASSED, "tpot": PASSED}),
        (2.9, 0.5, {"availability": PASSED, "ttft": FAILED, "tpot": PASSED}),
        (3.0, 0.4, {"availability": PASSED, "ttft": PASSED, "tpot": FAILED}),
    ],
)
def test_the_limits_themselves_are_good(ttft_seconds: float, tpot_seconds: float, expected: dict[str, bool]) -> None:
    objectives = Objectives(ttft_seconds=ttft_seconds, tpot_seconds=tpot_seconds)
    assert dict(objectives.judge(request(), 106.0)) == expected


@pytest.mark.parametrize(
    ("reason", "now", "expected"),
    [
        ("error", 100.5, {"availability": FAILED, "ttft": FAILED}),
        ("abort", 101.0, {}),  # the client left in time
        ("abort", 109.0, {"ttft": FAILED}),  # the client had waited for too long
    ],
)
def test_a_request_without_a_token(reason: FinishReason, now: float, expected: dict[str, bool]) -> None:
    assert dict(Objectives().judge(request(reason, tokens=0), now)) == expected


def test_what_generates_nothing_or_one_token_has_no_time_per_token() -> None:
    assert dict(Objectives().judge(request(tokens=1), 106.0)).keys() == {"availability", "ttft"}
    embedding = request(tokens=0)
    embedding.embed = True
    assert dict(Objectives().judge(embedding, 190.0)) == {"availability": PASSED}


def test_a_client_that_leaves_amid_the_answer_has_its_times_judged() -> None:
    assert dict(Objectives(ttft_seconds=3).judge(request("abort"), 106.0)) == {"ttft": PASSED, "tpot": FAILED}
