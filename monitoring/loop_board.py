"""The loop from feedback to the next version: cycles, their stages, the gate, and who decided what."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.panels import COUNT, RATE, SECONDS, SERVERS, SHARE, Rows, bars, board, lines, number, rate


def loop_board() -> Dashboard:
    cycles = [
        number(
            "Since the last run",
            SECONDS,
            "Since `deploy retrain` last ended without an error.",
            {"age": "time() - max(pawl_retrain_run_seconds)"},
            good=(2 * 86400, 8 * 86400),
            width=6,
        ),
        number(
            "Since the last cycle ended",
            SECONDS,
            "However it ended.",
            {"age": "time() - max(pawl_retrain_last_end_seconds)"},
            width=6,
        ),
        number(
            "Last verdict",
            COUNT,
            "1: how the last cycle ended.",
            {"{{verdict}}": "max by (verdict) (pawl_retrain_last_verdict)"},
            width=12,
        ),
        bars("Cycles", COUNT, "By how they ended.", {"{{verdict}}": "max by (verdict) (pawl_retrain_cycles)"}),
        bars(
            "Stages of the last cycle",
            SECONDS,
            "From the end of the stage before.",
            {"{{stage}}": "max by (stage) (pawl_retrain_stage_seconds)"},
        ),
        lines(
            "Feedback that comes in",
            RATE,
            "What the next cycle can learn from.",
            {"{{metric_name}}": f"sum by (metric_name) ({rate('pawl_feedback_total')})"},
        ),
    ]
    gate = [
        bars(
            "Kept its limit",
            COUNT,
            "1 if a figure of the last gate kept its limit.",
            {"{{figure}}": "max by (figure) (pawl_retrain_gate_passed)"},
            width=12,
        ),
        bars(
            "Figures of the gate",
            COUNT,
            "What was measured, with its 95 % interval.",
            {"{{figure}} {{bound}}": "max by (figure, bound) (pawl_retrain_gate_value)"},
            width=12,
        ),
    ]
    decisions = [
        number(
            "Since the last decision",
            SECONDS,
            "Movements in the registry's history.",
            {"{{action}}": "time() - (max by (action) (pawl_last_decision_seconds{S}) > 0)"},
            width=24,
        ),
        lines(
            "Decisions in all",
            COUNT,
            "All of them since the history began.",
            {"{{action}}": "max by (action) (pawl_decisions_total{S})"},
        ),
        lines(
            "Share of the candidate",
            SHARE,
            "Of the traffic.",
            {"{{version}}": f'max by (version) (pawl_version_share{{{SERVERS}, role="candidate"}})'},
        ),
        lines(
            "Versions that could not be loaded",
            COUNT,
            "Since the servers started.",
            {"{{instance}}": "pawl_version_load_failures_total{S}"},
        ),
    ]
    rows: Rows = {"Retraining": cycles, "The gate": gate, "Decisions": decisions}
    return board("Pawl: loop", "pawl-loop", "Retraining, the gate and decisions.", rows)
