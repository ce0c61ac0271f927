"""The mixed-precision recipe that is best on this machine within a budget.

    1. measure, once: what each product loses by each precision (compress/sensitivity.py), and what each costs here
       (compress/speeds.py)
    2. choose the cheapest precisions whose losses add up to no more than a limit (compress/allocation.py)
    3. build the recipe as `quantize` does, judge it on the validation text, and correct the limit; some times over
    4. time what was built, the hand-made recipes among it, and write the best that is truly within the budget

The text that it measures and judges by is neither calibrated on nor the gate's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from compress import allocation, pareto, speeds
from compress.candidates import OBJECTIVES, Candidates, Objective
from compress.measurements import Judged
from compress.pareto import Kind, Point, Row
from compress.recipes import RECIPES, SUFFIX, make_recipe, write_recipe
from compress.search_options import BudgetUnmet, SearchOptions
from compress.spending import ENOUGH, next_limit, parse_budget, use_of
from compress.subject import Subject
from proto.manifest import Recipe
from train.folders import refuse_existing


@dataclass(frozen=True, slots=True)
class Build:
    """A recipe that was judged."""

    recipe: Recipe
    choice: list[int]
    judged: Judged
    use: float  # of the budget

    @property
    def fits(self) -> bool:
        return self.use <= 1


def search(source: Path, target: Path, options: SearchOptions, *, threads: int) -> str:
    """Write the recipe `target` for the checkpoint `source`, and a picture beside it; returns the table.

    Raises CheckpointError, NativeUnavailable or ValueError for bad input, TrainError if `target` is there, and
    BudgetUnmet.
    """
    budget = parse_budget(options.budget)
    if target.suffix != SUFFIX:
        raise ValueError(f"{target} is to hold a recipe; give a name that ends in {SUFFIX}")
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    path = options.measurements or target.with_name(f"measurements{SUFFIX}")
    subject = Subject(source, path, options, threads)
    candidates = subject.candidates
    builds: list[Build] = []

    def judge(recipe: Recipe, choice: list[int]) -> Build:
        judged = subject.judge(recipe)
        builds.append(Build(recipe, choice, judged, use_of(budget, judged)))
        return builds[-1]

    for name in RECIPES:
        recipe = make_recipe(name, subject.decoder)
        if {recipe.default, *recipe.products.values()} <= {*subject.precisions}:
            judge(recipe, candidates.choice(recipe))
    least = float(candidates.kl.min(axis=1).sum())
    for number in range(options.builds):
        limit = next_limit([(candidates.kl_of(build.choice), build.use) for build in builds])
        choice = allocation.allocate(candidates.kl, candidates.costs[options.objective], max(limit, least))
        if choice is None or any(choice == build.choice for build in builds):
            break
        if ENOUGH <= judge(candidates.recipe(f"{target.stem}-{number + 1}", choice), choice).use <= 1:
            break
    if not any(build.fits for build in builds):
        best = min(builds, key=lambda build: build.use)
        raise BudgetUnmet(
            f"no recipe is within {options.budget!r}: {best.recipe.name} is nearest and uses {best.use:.2f} times as "
            f"much; allow more. What was measured is kept in {path}"
        )
    with tqdm(total=len(builds), desc="time", unit="recipe", disable=None) as bar:
        recipes = [build.recipe for build in builds]
        seconds = speeds.time_recipes(subject.checkpoint, recipes, threads=threads, progress=bar.update)
    costs: list[dict[Objective, float]] = [
        found | {"size": candidates.cost_of(build.choice, "size")} for build, found in zip(builds, seconds, strict=True)
    ]
    fitting = [i for i, build in enumerate(builds) if build.fits]
    chosen = min(fitting, key=lambda i: costs[i][options.objective])
    rows = compare(candidates, builds, costs, chosen)
    fronts = {o: [predict(candidates, builds, c) for c in allocation.front(candidates, o)] for o in OBJECTIVES}
    title = f"{source.resolve().name}: {options.objective} within {options.budget}"
    pareto.draw(target.with_suffix(".png"), title, fronts, [row.point for row in rows])
    write_recipe(target, candidates.recipe(target.stem, builds[chosen].choice))
    return pareto.table(rows)


def compare(
    candidates: Candidates, builds: Sequence[Build], costs: Sequence[dict[Objective, float]], chosen: int
) -> list[Row]:
    """What was predicted of every build beside what was measured."""
    rows = []
    for i, build in enumerate(builds):
        metrics = build.judged.metrics
        kind: Kind = "chosen" if i == chosen else "hand-made" if build.recipe.name in RECIPES else "tried"
        point = Point(build.recipe.name, kind, costs[i], metrics["perplexity"])
        predicted = predict(candidates, builds, build.choice)
        rows.append(Row(point, predicted, metrics["kl"], candidates.kl_of(build.choice), build.fits))
    return rows


def predict(candidates: Candidates, builds: Sequence[Build], choice: Sequence[int]) -> Point:
    """Costs and perplexity of a choice: log-perplexity grows with the predicted KL as it did in the builds."""
    growth = median(
        np.log(max(build.judged.metrics["perplexity_ratio"], 1.0)) / candidates.kl_of(build.choice) for build in builds
    )
    first = builds[0].judged.metrics
    reference = first["perplexity"] / first["perplexity_ratio"]
    perplexity = float(reference * np.exp(growth * candidates.kl_of(choice)))
    return Point("", "predicted", {o: candidates.cost_of(choice, o) for o in OBJECTIVES}, perplexity)
