"""`report.html`: what an artifact is and how it was judged, as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from compress import charts
from compress.budget import Budget
from compress.families import Decoder
from compress.figures import NAMES, write
from compress.gate import Evidence
from compress.pages import render
from compress.precisions import name_of, precision_of
from compress.product_errors import ProductError
from compress.sizes import parts_of
from compress.summary import shape, verdict
from proto.manifest import REPORT, Form, GateReport, Manifest


@dataclass(frozen=True, slots=True)
class Cell:
    """A form's figure as it is shown."""

    value: str
    bounds: str
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    limit: str
    cells: list[Cell]


def write_report(
    directory: Path,
    manifest: Manifest,
    gate: GateReport,
    evidence: Evidence[Form],
    decoder: Decoder,
    errors: Mapping[str, ProductError],
) -> None:
    """Write the page into the artifact. `manifest` lists no files yet, as the page will be one of them."""
    products = decoder.products
    names = list(dict.fromkeys(name_of(precision_of(manifest.recipe, product)) for product in products))
    drawn = {
        "perplexities": charts.perplexities(evidence.reference, evidence.scores),
        "identical": charts.identical_answers(evidence.identical),
        "divergences": charts.divergences(evidence.scores),
        "by_position": charts.divergence_by_position(evidence.scores),
        "errors": charts.product_errors(errors, products) if errors else "",
        "precisions": charts.precisions(manifest.recipe, products, names),
        "sizes": charts.sizes(parts_of(directory, decoder)),
    }
    forms = list(evidence.scores)
    page = render(
        "report.html",
        name=manifest.name,
        verdict=verdict(gate),
        shape=shape(manifest),
        gate=gate,
        forms=forms,
        rows=[first_row(gate, forms), *(row(gate, forms, figure) for figure in NAMES)],
        charts={name: Markup(svg) for name, svg in drawn.items()},
        precisions=names,
        serving=next(iter(gate.serving.values()), None),
        origin=origin(manifest),
    )
    (directory / REPORT).write_text(page, encoding="utf-8")


def first_row(gate: GateReport, forms: Sequence[Form]) -> Row:
    """The reference's own perplexity and accuracy stand in one cell, the same for all forms."""
    found = gate.metrics
    exact = f"{write('perplexity', found['perplexity_reference'])}, {write('accuracy', found['accuracy_reference'])}"
    return Row("float32: perplexity, next token found", "", [Cell(exact, "") for _ in forms])


def row(gate: GateReport, forms: Sequence[Form], figure: str) -> Row:
    limit = gate.thresholds.get(figure)
    cells = []
    for form in forms:
        name = figure if form == gate.form else f"{form}_{figure}"
        bounds = gate.intervals.get(name)
        text = f"{write(figure, bounds.low)} to {write(figure, bounds.high)}" if bounds else ""
        own = {figure: gate.metrics[name]}, {figure: bounds} if bounds else {}
        holds = limit is None or not Budget({figure: limit}).failures(*own)
        cells.append(Cell(write(figure, gate.metrics[name]), text, holds))
    return Row(NAMES[figure], "" if limit is None else write(figure, limit), cells)


def origin(manifest: Manifest) -> list[tuple[str, str]]:
    """What it was made of. When and by which command is in the manifest alone: the page is the same each time."""
    lineage = manifest.lineage
    return [
        ("checkpoint", lineage.checkpoint),
        *((f"text, {name.replace('_', ' ')}", digest) for name, digest in lineage.datasets.items()),
        ("tools", ", ".join(f"{tool} {version}" for tool, version in lineage.tools.items())),
    ]
