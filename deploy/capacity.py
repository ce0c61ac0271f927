"""`python -m deploy plan`: how many replicas a stream of requests needs, and what they cost.

Each profile is a size of replica that was measured (`python -m bench.step_cost`). For each the real scheduler's policy
is simulated (deploy/simulation.py), with as many slots as hold the most; deploy/sizing.py says how that scales.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deploy.capacity_profile import load
from deploy.errors import DeployError
from deploy.objectives import Objective
from deploy.simulation import Outcome
from deploy.sizing import GROUPS, Demand, Fleet, Size, best_size, fleets
from deploy.workload import FORMS, Lengths, Workload
from train.flags import option
from train.plan import quantity
from train.tables import aligned

MINUTE = 60.0
STATISTICS = ("p50", "p95", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    profile: Path = field(metadata={"help": "what bench.step_cost wrote", "parse": Path, "positional": True})
    others: tuple[Path, ...] = option((), "further profiles: other threads, machines or artifacts to choose among")
    rate: tuple[str, ...] = option(("60",), "requests a minute, such as 90, 20K or 1M; several make a table")
    prompt: str = option("130", f"tokens of a prompt: {FORMS}")
    output: str = option("64", "tokens of an answer, in the same forms")
    slo: tuple[str, ...] = option(("ttft:p95:1000", "itl:p99:100"), "METRIC:STATISTIC:MILLISECONDS to keep to")
    slots: int = option(
        0, "requests that run together; 0: as many as hold the most, at most those of the profile", least=0
    )
    cost_per_hour: tuple[str, ...] = option(("0",), "of one replica, in your currency; or one for each profile")
    most_utilisation: float = option(
        0.9, "of what a replica can do at all, whatever the objectives", least=0.01, most=1
    )
    requests: int = option(1000, "simulated for each replica", least=100)
    seed: int = option(0, "of the arrivals and lengths", least=0)
    json: bool = option(False, "print one JSON document")


def command(options: Options) -> int:
    demand = Demand(
        Workload(Lengths.parse(options.prompt), Lengths.parse(options.output), options.seed),
        tuple(Objective.parse(text) for text in options.slo),
        options.requests,
        options.most_utilisation,
    )
    paths = (options.profile, *options.others)
    rates = [number("--rate", text) for text in options.rate]
    costs = [number("--cost-per-hour", text, least=0) for text in options.cost_per_hour]
    costs *= len(paths) if len(costs) == 1 else 1
    if len(costs) != len(paths):
        raise DeployError(
            f"--cost-per-hour has {len(costs)} values for {len(paths)} profiles; give one, or one for each"
        )
    profiles = [load(path) for path in paths]
    for path, profile in zip(paths, profiles, strict=True):
        if options.slots > profile.engine.max_running:
            raise DeployError(
                f"--slots {options.slots} is beyond the {profile.engine.max_running} that {path} was measured with; "
                "give fewer, or measure with more"
            )
    sizes = [best_size(profile, demand, options.slots) for profile in tqdm(profiles, unit="profile", disable=None)]
    by_second = {rate / MINUTE: rate for rate in rates}
    held = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if size.rate]
    with tqdm(total=len(held) * len(rates) * len(GROUPS), unit="fleet", disable=None) as bar:
        rows = []
        for size, cost in held:
            for rate, fleet in fleets(size, demand, list(by_second)):
                rows.append(row(size, cost, by_second[rate], fleet))
                bar.update()
    rows.sort(key=lambda row: row["per_minute"])
    document = {
        "prompt": options.prompt,
        "output": options.output,
        "slo": list(options.slo),
        "most_utilisation": options.most_utilisation,
        "sizes": [describe(size, cost) for size, cost in zip(sizes, costs, strict=True)],
        "fleets": rows,
    }
    print(json.dumps(document, indent=1) if options.json else as_text(document, demand, sizes))
    if not rows:
        raise DeployError(
            "no size meets the objectives at any rate; allow more time, shorten prompts, or measure a faster machine"
        )
    return 0


def number(flag: str, text: str, least: float = 1e-6) -> float:
    """Of a flag that takes several. Raises DeployError."""
    try:
        value = 0.0 if text == "0" else quantity(text)
    except argparse.ArgumentTypeError as error:
        raise DeployError(f"{flag}: {error}") from None
    if value < least:
        raise DeployError(f"{flag} {text} is out of range; give a positive number")
    return value


def describe(size: Size, cost: float) -> dict[str, Any]:
    """One replica. Rates are requests a minute, times milliseconds."""
    profile = size.profile
    per_million = cost / (size.rate * 3600) * 1e6 if size.rate else None
    return {
        "name": profile.name,
        "digest": profile.digest,
        "about": profile.about,
        "processors": profile.processors,
        "slots": size.slots,
        "saturated_per_minute": MINUTE * size.saturated,
        "holds_per_minute": MINUTE * size.rate,
        "cost_per_hour": cost,
        "cost_per_million_requests": per_million,
        "reasons": size.reasons,
        **figures(size.outcome),
    }


def row(size: Size, cost: float, rate: float, fleet: Fleet) -> dict[str, Any]:
    """A fleet for `rate` requests a minute."""
    return {
        "name": size.profile.name,
        "processors": size.profile.processors,
        "per_minute": rate,
        "balance": fleet.balance,
        "replicas": fleet.replicas,
        "cost_per_hour": cost * fleet.replicas,
        **figures(fleet.outcome),
    }


def figures(outcome: Outcome) -> dict[str, float]:
    times = {
        f"{metric}_{statistic}_ms": 1000 * outcome.figure(metric, statistic)
        for metric in ("ttft", "itl")
        for statistic in STATISTICS
    }
    return times | {
        "utilisation": outcome.utilisation,
        "waiting": outcome.waiting,
    }


def as_text(document: dict[str, Any], demand: Demand, sizes: list[Size]) -> str:
    lines = [
        f"prompts of {document['prompt']} and answers of {document['output']} tokens, Poisson arrivals; "
        + "; ".join(map(str, demand.objectives))
    ]
    for size, told in zip(sizes, document["sizes"], strict=True):
        fit = size.profile.fit
        lines += [
            "",
            f"{told['name']} {told['about']}",
            f"  times from {fit.turns} measured turns, half of them told within {fit.median_error:.0%}, sums of "
            f"any group of them within {fit.largest_bias:.0%}",
        ]
        if size.rate:
            lines.append(
                f"  one replica with {told['slots']} slots holds {told['holds_per_minute']:.0f} requests a minute, "
                f"{size.rate / size.saturated:.0%} of what it can do at all"
            )
        else:
            lines.append(f"  no rate is low enough: {'; '.join(told['reasons'])}")
    if document["fleets"]:
        lines += ["", table(document["fleets"])]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    head = ["size", "a minute", "balance", "replicas", "cost/hour"]
    head += [f"TTFT {statistic}" for statistic in STATISTICS] + ["ITL p50", "ITL p99", "busy", "waiting"]
    cells = [
        [
            f"{row['name']}, {row['processors']} processors",
            f"{row['per_minute']:,.0f}",
            row["balance"],
            f"{row['replicas']:,}",
            f"{row['cost_per_hour']:,.2f}",
            *(f"{row[f'ttft_{statistic}_ms']:.0f}" for statistic in STATISTICS),
            f"{row['itl_p50_ms']:.0f}",
            f"{row['itl_p99_ms']:.0f}",
            f"{row['utilisation']:.0%}",
            f"{row['waiting']:.1f}",
        ]
        for row in rows
    ]
    return aligned(head, cells)


COMMANDS = {"plan": (Options, command)}
