"""A comparison for people: as text for the terminal, and as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from markupsafe import Markup

from compress import charts
from compress.compare import Comparison, bytes_by_part
from compress.figures import NAMES, write, write_difference
from compress.pages import render
from compress.summary import shape
from proto.manifest import Interval

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, as it is shown."""

    name: str
    reference: str
    first: str
    second: str
    difference: str
    bounds: str


@dataclass(frozen=True, slots=True)
class Cost:
    """A size or a speed, as it is shown."""

    name: str
    first: str
    second: str
    ratio: str


def rows_of(comparison: Comparison) -> list[Row]:
    a, b = (comparison.figures[subject.name].metrics for subject in comparison.subjects)
    rows = []
    for figure, name in NAMES.items():
        own = comparison.of_reference.metrics.get(f"{figure}_reference")
        rows.append(
            Row(
                name,
                "" if own is None else write(figure, own),
                write(figure, a[figure]),
                write(figure, b[figure]),
                write_difference(figure, comparison.difference.metrics[figure]),
                _bounds(figure, comparison.difference.intervals.get(figure)),
            )
        )
    return rows


def costs_of(comparison: Comparison) -> list[Cost]:
    """Sizes by group of tensors, then speeds."""
    costs = [
        Cost(f"size of {part}", f"{a / MIB:.1f} MiB", f"{b / MIB:.1f} MiB", _ratio(a, b))
        for part, (a, b) in bytes_by_part(comparison).items()
    ]
    if comparison.serving:
        x, y = (comparison.serving[subject.name] for subject in comparison.subjects)
        alone = [1000 / cost.decode_milliseconds for cost in (x, y)]
        together = [cost.tokens_per_second for cost in (x, y)]
        memory = [cost.resident_bytes for cost in (x, y)]
        for name, (one, other) in (("1 stream", alone), (f"{x.streams} streams", together)):
            costs.append(Cost(name, f"{one:.0f} tokens/s", f"{other:.0f} tokens/s", _ratio(one, other)))
        one, other = memory
        costs.append(Cost("resident memory", f"{one / MIB:.0f} MiB", f"{other / MIB:.0f} MiB", _ratio(one, other)))
    return costs


def to_text(comparison: Comparison) -> str:
    a, b = (subject.title for subject in comparison.subjects)
    figures = [Row("", comparison.reference, a, b, "difference", "95 % interval"), *rows_of(comparison)]
    costs = [Cost("", a, b, "second by first"), *costs_of(comparison)]
    tokens, windows = _text_read(comparison)
    told = f"against {comparison.reference}, on {tokens:,} held-out tokens in {windows} windows"
    blocks = [told, *_columns([astuple(row) for row in figures]), "", *_columns([astuple(cost) for cost in costs])]
    return "\n".join([*blocks, f"on {comparison.machine}"] if comparison.serving else blocks)


def to_page(comparison: Comparison) -> str:
    evidence = comparison.evidence
    tokens, windows = _text_read(comparison)
    drawn = {
        "perplexities": charts.perplexities(
            evidence.reference, evidence.scores, f"perplexity of {comparison.reference}"
        ),
        "identical": charts.identical_answers(evidence.identical),
        "divergences": charts.divergences(evidence.scores),
        "by_position": charts.divergence_by_position(evidence.scores),
    }
    return render(
        "compare.html",
        name=" and ".join(subject.name for subject in comparison.subjects),
        names=[subject.name for subject in comparison.subjects],
        titles=[subject.title for subject in comparison.subjects],
        shapes=[(subject.name, shape(subject.manifest)) for subject in comparison.subjects],
        reference=comparison.reference,
        rows=rows_of(comparison),
        costs=costs_of(comparison),
        charts={name: Markup(svg) for name, svg in drawn.items()},
        tokens=tokens,
        windows=windows,
        timed=next(iter(comparison.serving.values()), None),
        machine=comparison.machine,
    )


def _text_read(comparison: Comparison) -> tuple[int, int]:
    reference = comparison.evidence.reference
    return sum(map(len, reference)), len(reference)


def _bounds(figure: str, bounds: Interval | None) -> str:
    return f"{write_difference(figure, bounds.low)} to {write_difference(figure, bounds.high)}" if bounds else ""


def _ratio(first: float, second: float) -> str:
    return f"{second / first:.2f}" if first else ""


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, values to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
