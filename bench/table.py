"""The result for people: one line a measurement, the baseline's before ours."""

from __future__ import annotations

from bench.row import Load, Row

HEAD = (
    *("part", "prompt", "at once", "system", "tok/s", "x peer", "of engine", "prefill"),
    *("TTFT ms", "p99 TTFT", "TPOT ms", "p99 ITL", "failed"),
)


def table(rows: list[Row], baseline: str) -> str:
    """`rows` in any order; the ratio is to the row of `baseline` with the same part and load."""
    base = {(row.part, row.load): row.output_throughput for row in rows if row.system == baseline}

    def order(row: Row) -> tuple[str, int, int, bool]:
        load: Load = row.load
        return row.part, load.input_len, load.concurrency, row.system != baseline

    lines = [HEAD]
    for row in sorted(rows, key=order):
        peer = base.get((row.part, row.load))
        get = row.figures.get
        lines.append(
            (
                row.part,
                str(row.load.input_len),
                str(row.load.concurrency),
                row.system,
                f"{row.output_throughput:.0f}",
                f"{row.output_throughput / peer:.2f}" if peer else "",
                _number(get("engine_share"), 2),
                _number(get("prefill_throughput"), 0),
                _number(get("median_ttft_ms"), 0),
                _number(get("p99_ttft_ms"), 0),
                _number(get("median_tpot_ms"), 1),
                _number(get("p99_itl_ms"), 1),
                _number(get("failed"), 0),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {HEAD.index("part"), HEAD.index("system")}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
