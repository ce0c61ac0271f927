"""Profiles whose times are known by hand."""

from __future__ import annotations

from typing import Any

from deploy.capacity_profile import FORMAT, EngineShape, Profile
from deploy.step_model import TERMS, Fit, StepModel

ENGINE = EngineShape(
    max_running=8, max_queue=64, prefill_chunk=512, any_chunking=True, itl_limit=2.0, capacity=1024, num_blocks=128
)
FIT = Fit(turns=100, total_seconds=1.0, median_error=0.02, p90_error=0.05, largest_bias=0.01, bias={})


def make_profile(times: dict[str, float], front: float = 0.0, **engine: Any) -> Profile:
    """`times`: seconds of one of each of TERMS by its first words, others 0. Turns alike take exactly as long."""
    each = [next((value for name, value in times.items() if term.startswith(name)), 0.0) for term in TERMS]
    return Profile(
        format=FORMAT,
        name="tiny",
        digest="0" * 64,
        about="(recipe w8a8, native operators)",
        processors=2,
        engine=EngineShape(**{**{name: getattr(ENGINE, name) for name in ENGINE.__struct_fields__}, **engine}),
        front_seconds=front,
        model=StepModel(seconds_each=each, spread=[1.0]),
        fit=FIT,
        machine={},
    )
