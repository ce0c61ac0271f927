"""The charts of an artifact's report. Each gives an SVG whose colours are those of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compress.generations import Same
from compress.precisions import name_of, precision_of
from compress.product_errors import ProductError
from compress.reading import Name
from compress.scores import KL, NLL, Table
from compress.sizes import Part
from compress.svg import Axis, Cell, Plot, axis_for, bars, grid, percent
from proto.manifest import Recipe

BINS = 48  # of a histogram
POSITIONS = 32  # groups of positions
LAYER = re.compile(r"layers\.(\d+)\.(\w+)")
MIB = 1 << 20

Forms = Mapping[Name, Sequence[Table]]  # form -> scores by window, as in compress/scores.py


def perplexities(reference: Sequence[Table], forms: Forms[Name], label: str = "perplexity of the float32 model") -> str:
    """A point for each window: how much the artifact loses, by how hard the text is."""
    exact = [float(np.exp(table[:, NLL].mean())) for table in reference]
    series = {
        form: [float(np.exp(table[:, NLL].mean())) / x - 1 for table, x in zip(tables, exact, strict=True)]
        for form, tables in forms.items()
    }
    changes = [change for values in series.values() for change in values]
    plot = Plot(
        axis_for(exact, label, is_log=True),
        axis_for([0.0, *changes], "change", write=percent),
    )
    plot.line([(plot.x.low, 0.0), (plot.x.high, 0.0)], "axis")
    for at, (form, values) in enumerate(series.items()):
        titles = [
            f"window {i}, {form}: perplexity {x * (1 + change):.2f}, reference {x:.2f}, {100 * change:+.2f} %"
            for i, (x, change) in enumerate(zip(exact, values, strict=True))
        ]
        plot.points(list(zip(exact, values, strict=True)), f"c{at}", titles)
    return plot.draw("Change of perplexity by window")


def divergences(forms: Forms[Name]) -> str:
    """A histogram of the tokens by their KL divergence."""
    found = {form: np.maximum(np.concatenate(tables)[:, KL], 1e-7) for form, tables in forms.items()}
    every = np.concatenate(list(found.values()))
    edges = np.geomspace(every.min() / 1.01, every.max() * 1.01, BINS + 1)
    counts = {form: np.histogram(values, edges)[0] / len(values) for form, values in found.items()}
    highest = max(float(shares.max()) for shares in counts.values())
    plot = Plot(
        Axis(float(edges[0]), float(edges[-1]), "KL divergence of a token, nats", is_log=True),
        Axis(0.0, 1.06 * highest, "share of tokens", write=percent),
    )
    for at, (form, shares) in enumerate(counts.items()):
        for low, high, share in zip(edges, edges[1:], shares, strict=False):
            if share and at == 0:
                title = f"{form}: {100 * share:.1f} % of tokens from {low:.2g} to {high:.2g} nats"
                plot.box((float(low), 0.0), (float(high), float(share)), "c0 soft", title)
        if at:
            middles = np.sqrt(edges[1:] * edges[:-1])
            plot.line([(float(x), float(y)) for x, y in zip(middles, shares, strict=True)], f"l{at}", form)
    return plot.draw("Histogram of KL divergence")


def divergence_by_position(forms: Forms[Name]) -> str:
    """The mean over windows, in groups of positions: whether error grows with the context."""
    shortest = min(len(table) for tables in forms.values() for table in tables)
    groups = np.array_split(np.arange(shortest), min(POSITIONS, shortest))
    lines = {
        form: [(float(group.mean()), float(np.mean([table[group, KL].mean() for table in tables]))) for group in groups]
        for form, tables in forms.items()
    }
    highest = max(y for points in lines.values() for _, y in points)
    plot = Plot(
        Axis(0.0, float(shortest), "position in the window, tokens"),
        Axis(0.0, 1.06 * highest or 1.0, "mean KL, nats"),
    )
    for at, (form, points) in enumerate(lines.items()):
        plot.line(points, f"l{at}", form)
    return plot.draw("KL divergence by position")


def identical_answers(identical: Mapping[Name, Sequence[Same]]) -> str:
    """The share of greedy answers that are still the reference's, or ended as it would, after so many tokens."""
    longest = max(1, *(whole for answers in identical.values() for _, whole in answers))
    plot = Plot(
        Axis(0.0, float(longest), "tokens generated"),
        Axis(0.0, 1.04, "answers still the same", write=percent),
    )
    for at, (form, answers) in enumerate(identical.items()):
        shares = [np.mean([same >= n or same == whole for same, whole in answers]) for n in range(longest + 1)]
        plot.line([(float(n), float(share)) for n, share in enumerate(shares)], f"l{at}", form)
    return plot.draw("Share of greedy answers that are still identical")


def product_errors(errors: Mapping[str, ProductError], products: Sequence[str]) -> str:
    """Layers by products, darker where the output's error is larger."""
    largest = max((error.output for error in errors.values() if error.output is not None), default=1.0)

    def cell(product: str) -> Cell:
        error = errors.get(product)
        if error is None:
            return Cell(f"{product}: not rounded", "none")
        if error.output is None:
            return Cell(f"{product}: weight {100 * error.weight:.2f} % off, output not measured", "none")
        title = f"{product}: output {100 * error.output:.2f} % off, weight {100 * error.weight:.2f} %"
        return Cell(title, "heat", 0.06 + 0.94 * error.output / largest)

    return grid(_by_role(products, cell), "Error of each product's output", "layer")


def precisions(recipe: Recipe, products: Sequence[str], names: Sequence[str]) -> str:
    """Layers by products, a colour for each of the precisions called `names`."""

    def cell(product: str) -> Cell:
        name = name_of(precision_of(recipe, product))
        return Cell(f"{product}: {name}", f"p{names.index(name)}")

    return grid(_by_role(products, cell), "Precision of each product", "layer", width=460)


def sizes(parts: Mapping[str, Part]) -> str:
    rows = []
    for role, part in parts.items():
        bits = "" if math.isnan(part.bits_per_weight) else f" · {part.bits_per_weight:.2f} bits a weight"
        rows.append((role, float(part.size_bytes), f"{part.size_bytes / MIB:.1f} MiB{bits}"))
    return bars(rows, "Size of each part")


def _by_role(products: Sequence[str], cell: Callable[[str], Cell]) -> list[tuple[str, list[Cell]]]:
    """A row for each role, in the order in which they come."""
    rows: dict[str, list[Cell]] = {}
    for product in products:
        found = LAYER.fullmatch(product)
        rows.setdefault(found[2] if found else product, []).append(cell(product))
    return list(rows.items())
