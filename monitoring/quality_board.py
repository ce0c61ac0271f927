"""Quality: what people say of the answers, versions side by side, and drift against the time of judgement."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.panels import COUNT, RATE, SECONDS, SERVERS, SHARE, Rows, bars, board, lines, number, quantiles, rate

DOWN = f'sum by (version) (increase(pawl_feedback_total{{{SERVERS}, metric_name="thumbs", value="false"}}[$__range]))'
THUMBS = f'sum by (version) (increase(pawl_feedback_total{{{SERVERS}, metric_name="thumbs"}}[$__range]))'
Z = 1.96  # of a 95 % interval


def wilson(sign: str) -> str:
    """A bound of Wilson's interval of the share of thumbs down; `sign` is - or +."""
    share, count = f"({DOWN} / {THUMBS})", THUMBS
    spread = f"{Z} * sqrt({share} * (1 - {share}) / {count} + {Z**2 / 4:.4f} / {count} ^ 2)"
    return f"({share} + {Z**2 / 2:.4f} / {count} {sign} {spread}) / (1 + {Z**2:.4f} / {count})"


def of_versions(metric: str, labels: str = "") -> str:
    return f"sum by (version) ({rate(metric, labels)})"


def finished(reason: str) -> str:
    condition = f'finished_reason="{reason}"'
    return f"{of_versions('vllm:request_success_total', condition)} / {of_versions('vllm:request_success_total')}"


def slo_of_versions(slo: str) -> str:
    condition = f'slo="{slo}"'
    return f"{of_versions('pawl_slo_good_total', condition)} / {of_versions('pawl_slo_requests_total', condition)}"


def quality_board() -> Dashboard:
    feedback = [
        lines(
            "Feedback by kind",
            RATE,
            "What was stored, by kind and value.",
            {"{{metric_name}} {{value}}": f"sum by (metric_name, value) ({rate('pawl_feedback_total')})"},
        ),
        number(
            "Feedback coverage",
            SHARE,
            "Judgements for each recorded answer, in the time shown.",
            {
                "coverage": "sum(increase(pawl_feedback_total{S}[$__range]))"
                f' / sum(increase(pawl_records_written_total{{{SERVERS}, kind="interaction"}}[$__range]))'
            },
            width=8,
        ),
        bars(
            "Thumbs down",
            SHARE,
            "Of all thumbs on a version in the time shown, with Wilson's 95 % interval.",
            {
                "{{version}}": f"{DOWN} / {THUMBS}",
                "{{version}} from": wilson("-"),
                "{{version}} to": wilson("+"),
            },
        ),
        lines(
            "Interactions lost, feedback refused",
            RATE,
            "Because the store failed or its queue was full.",
            {
                "lost": f"sum({rate('pawl_interactions_lost_total')})",
                "refused": f"sum({rate('pawl_feedback_refused_total')})",
            },
            width=24,
        ),
    ]
    versions = [
        lines(
            "Share of the traffic",
            SHARE,
            "As it is set.",
            {"{{version}} {{role}}": "max by (version, role) (pawl_version_share{S})"},
        ),
        lines("Requests", RATE, "Finished, by version.", {"{{version}}": of_versions("vllm:request_success_total")}),
        lines(
            "Failed",
            SHARE,
            "Requests that failed, of those that finished.",
            {"{{version}}": finished("error")},
        ),
        lines("First token in time", SHARE, "Of the requests that count.", {"{{version}}": slo_of_versions("ttft")}),
        lines("Tokens in time", SHARE, "Of the requests that count.", {"{{version}}": slo_of_versions("tpot")}),
        lines(
            "Cut off at the limit",
            SHARE,
            "Answers that ended at their limit of tokens, of those that finished.",
            {"{{version}}": finished("length")},
        ),
        lines(
            "Time to first token",
            SECONDS,
            "By version.",
            quantiles("vllm:time_to_first_token_seconds", "version"),
            width=12,
        ),
        lines(
            "Answer lengths",
            COUNT,
            "Tokens, by version.",
            quantiles("vllm:request_generation_tokens", "version"),
            width=12,
        ),
    ]
    drift = [
        bars(
            "Distance",
            COUNT,
            "From the reference: PSI, or the change of a rate. `python -m monitoring drift --textfile` writes it.",
            {"{{figure}} {{kind}}": "pawl_drift_distance"},
        ),
        bars(
            "Drifted",
            COUNT,
            "1 if a figure moved beyond its limit, and not by chance.",
            {"{{figure}}": "pawl_drift_drifted"},
        ),
        bars(
            "Values",
            COUNT,
            "Means and rates, in the reference and now.",
            {"{{figure}} {{window}}": "pawl_drift_value"},
            height=14,
        ),
    ]
    rows: Rows = {"Feedback": feedback, "Versions side by side": versions, "Drift": drift}
    return board("Pawl: quality", "pawl-quality", "Feedback, versions side by side, drift.", rows)
