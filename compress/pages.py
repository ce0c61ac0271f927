"""Pages that stand alone: a template of this folder, with the style sheet inside."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).parent
STYLE = "page.css"


def render(template: str, **values: Any) -> str:
    """The page of a template; what is no Markup is escaped."""
    return _environment().get_template(template).render(css=(FOLDER / STYLE).read_text(), **values)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
