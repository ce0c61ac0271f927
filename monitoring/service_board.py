"""The service as its users see it: objectives, the four golden signals, and who answers."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.panels import (
    COUNT,
    RATE,
    SECONDS,
    SHARE,
    WINDOW,
    Rows,
    board,
    heat,
    lines,
    number,
    quantiles,
    rate,
)

BAD = "sum by (slo) (increase(pawl_slo_requests_total{S}[WINDOW]) - increase(pawl_slo_good_total{S}[WINDOW]))"
GOOD = (
    "sum by (slo) (increase(pawl_slo_good_total{S}[$__range]))"
    " / sum by (slo) (increase(pawl_slo_requests_total{S}[$__range]))"
)
BURN = (
    f"(1 - sum by (slo) ({rate('pawl_slo_good_total')}) / sum by (slo) ({rate('pawl_slo_requests_total')}))"
    " / on (slo) (1 - max by (slo) (pawl_slo_target{S}))"
)
UNFINISHED = 'finished_reason=~"error|abort"'


def service_board() -> Dashboard:
    objectives = [
        number("Good requests", SHARE, "For each objective, in the time shown.", {"{{slo}}": GOOD}, width=12),
        number(
            "Target",
            SHARE,
            "The share that is to be good: --slo-target.",
            {"{{slo}}": "max by (slo) (pawl_slo_target{S})"},
            width=12,
        ),
        lines(
            "Burn rate",
            COUNT,
            "1: the budget of bad requests is just used up in the time it is for. Alerts are at 14.4, 6 and 1.",
            {"{{slo}}": BURN},
            width=12,
        ),
        lines(
            "Bad requests",
            COUNT,
            "Those that were not good, for each objective.",
            {"{{slo}}": BAD.replace("WINDOW", WINDOW)},
            width=12,
        ),
    ]
    signals = [
        lines(
            "Traffic",
            RATE,
            "Requests that finished, and calls of any kind.",
            {
                "requests": f"sum({rate('vllm:request_success_total')})",
                "calls": f"sum({rate('http_requests_total')})",
            },
        ),
        lines(
            "Answered calls by status",
            RATE,
            "A client that left early counts as 4xx.",
            {
                "{{status}}": f"sum by (status) ({rate('http_requests_total')})",
            },
            stack=True,
        ),
        lines(
            "Failed and refused",
            RATE,
            "Requests that failed or were aborted, by cause, and those refused at the door.",
            {
                "{{finished_reason}}": f"sum by (finished_reason) ({rate('vllm:request_success_total', UNFINISHED)})",
                "refused: {{reason}}": f"sum by (reason) ({rate('vllm:admission_rejections_total')})",
            },
        ),
        lines(
            "Time to first token",
            SECONDS,
            "Arrival to first token, the queue included.",
            quantiles("vllm:time_to_first_token_seconds"),
        ),
        lines("Between two tokens", SECONDS, "Inter-token latency.", quantiles("vllm:inter_token_latency_seconds")),
        lines("Whole request", SECONDS, "Arrival to end.", quantiles("vllm:e2e_request_latency_seconds")),
        heat(
            "Time to first token, spread",
            SECONDS,
            "Requests by their time to first token.",
            "vllm:time_to_first_token_seconds",
        ),
        heat(
            "Between two tokens, spread",
            SECONDS,
            "Tokens by their inter-token latency.",
            "vllm:inter_token_latency_seconds",
        ),
        lines(
            "Saturation",
            SHARE,
            "What is in use of the slots and of the KV cache; over 100 % of the slots waits.",
            {
                "slots": "sum(vllm:num_requests_running{S}) / sum(pawl_slots{S})",
                "KV cache": "max(vllm:kv_cache_usage_perc{S})",
            },
        ),
    ]
    answers = [
        number("Servers up", COUNT, "Servers that Prometheus reaches.", {"up": "count(pawl_slots{S})"}),
        number(
            "Registry in step",
            COUNT,
            "1 if every server answers with what the registry names.",
            {"in step": "min(pawl_registry_in_step{S})"},
            good=(1, 0.5),
        ),
        number("Waiting", COUNT, "Requests that wait.", {"waiting": "sum(vllm:num_requests_waiting{S})"}, good=(5, 20)),
        lines(
            "Versions",
            SHARE,
            "The share of the traffic that each version gets.",
            {
                "{{version}} {{role}}": "max by (version, role) (pawl_version_share{S})",
            },
            width=12,
        ),
    ]
    rows: Rows = {"Objectives": objectives, "Golden signals": signals, "Who answers": answers}
    return board("Pawl: service", "pawl-service", "Objectives and golden signals.", rows)
