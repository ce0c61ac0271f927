"""`python -m deploy check`: every overlay with every combination of components renders, and is what it must be.

Each document is held to its schema, Kubernetes' own or the one that its project publishes, and each rendering to the
assertions of deploy/assertions.py. No cluster is needed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import kubernetes_validate
from tqdm import tqdm

from deploy import checkov
from deploy.assertions import ASSERTIONS, commands_are_understood
from deploy.crds import validators
from deploy.errors import DeployError
from deploy.manifests import Document, Manifests, title
from deploy.render import DEFAULTS, EXTRAS, MODEL_SOURCES, OVERLAYS, problem, render
from train.flags import option

THREADS = 2  # kustomize is a process; more than the processors gain nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    together: int = option(2, "components that are combined: every set of so many and fewer, and all of them", least=0)
    kubernetes: str = option("1.37", "version whose schemas are applied")
    checkov: str = option("", "program of checkov, to run its checks too")


def command(options: Check) -> int:
    found: dict[str, list[str]] = {}
    cases = list(combinations(options.together))
    number = len(cases)

    def judge(case: tuple[str, tuple[str, ...]]) -> list[str]:
        return problems_of(Manifests(render(*case)), options.kubernetes)

    with ThreadPoolExecutor(THREADS) as pool:
        for (overlay, components), problems in tqdm(
            zip(cases, pool.map(judge, cases), strict=True), total=len(cases), unit="rendering", disable=None
        ):
            for text in problems:
                found.setdefault(text, []).append(f"{overlay} with {', '.join(components)}")
    told = [f"{text} (in {len(where)}, first {where[0]})" for text, where in found.items()]
    passed = 0
    if options.checkov:
        # A component's documents are the same whatever stands beside it: alone and all together say it all.
        cases = list(combinations(0))
        passed, more = checkov.problems(options.checkov, {"-".join((o, *c)): render(o, c) for o, c in cases})
        told += more
    if told:
        raise DeployError("\n".join(told))
    print(
        f"{number} renderings are as they must be, by Kubernetes {options.kubernetes}'s schemas and our assertions"
        + (f", and {len(cases)} of them by {passed} checks of checkov" if passed else "")
    )
    return 0


def combinations(together: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each overlay as it is, and with each source of the model and the sets of `together` others, fewer, and all."""
    sizes = sorted({*range(min(together, len(EXTRAS)) + 1), len(EXTRAS)})
    for overlay in OVERLAYS:
        yield overlay, DEFAULTS
        for source, size in itertools.product(MODEL_SOURCES, sizes):
            for extras in itertools.combinations(EXTRAS, size):
                # What does not go together is told by `render`; "all" is then all that do.
                fitting = tuple(
                    name for name in extras if size == len(EXTRAS) and not problem((source, name, "gateway"))
                )
                chosen = (source, *(fitting if size == len(EXTRAS) else extras))
                if not problem(chosen):
                    yield overlay, chosen


def problems_of(manifests: Manifests, kubernetes: str) -> list[str]:
    """One sentence for each thing that is wrong; what relies on others is not looked at before those are right."""
    found = [
        f"{title(document)}: {text}"
        for document in manifests.documents
        for text in schema_problems(json.dumps(document, sort_keys=True), kubernetes)
    ]
    found = found or list(commands_are_understood(manifests))
    return found or [text for assertion in ASSERTIONS for text in assertion(manifests)]


@cache  # renderings share most of their documents
def schema_problems(text: str, kubernetes: str) -> tuple[str, ...]:
    document: Document = json.loads(text)
    if validator := validators().get((document["apiVersion"], document["kind"])):
        return tuple(
            f"{error.json_path.removeprefix('$.')}: {error.message[:300]}" for error in validator.iter_errors(document)
        )
    try:
        kubernetes_validate.validate(document, kubernetes, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(map(str, error.path))}: {error.message[:300]}",)
    except kubernetes_validate.SchemaNotFoundError as error:
        return (str(error.message),)
    return ()


COMMANDS = {"check": (Check, command)}
