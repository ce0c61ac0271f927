"""The standard library of the running interpreter as text, and its functions as questions with answers."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, programs, other people's code, and what no person wrote.
LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__")
)
LEFT_OUT_MODULES = frozenset(("pydoc_data.topics",))
GENERATED = re.compile(r"(auto-?generated|\bgenerated (from|by)\b|\bdo not edit\b)", re.IGNORECASE)
GENERATED_WITHIN = 600  # characters from a file's start: later, a program may speak of what it generates
MIN_LINES, MAX_LINES = 3, 60  # of an answer
MIN_WORDS = 3  # of a docstring's first paragraph
HELD_OUT_PERCENT = 10
# Few packages are large, so most hashes hold out far more or less than a tenth. The first number, put before the
# name, with which CPython 3.11 has 9 to 11.5 % of its text and of its pairs held out, no package above a fifth of that.
SALT = "68/"

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Module:
    """One file. `tree` is what it parses to."""

    name: str
    text: str
    tree: ast.Module

    @property
    def held_out(self) -> bool:
        """By a hash of the top-level name alone, so that a package stays together in every version of Python.

        `_pydecimal` goes with `decimal` and `_weakrefset` with `weakrefset`: twins share text.
        """
        top = re.sub(r"^_(py)?", "", self.name.split(".")[0])
        return int.from_bytes(hashlib.sha256((SALT + top).encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True, slots=True)
class Pair:
    """A function as a question (its name, signature and what it is for) and an answer (its source)."""

    module: str
    function: str
    instruction: str
    answer: str
    digest: str


def read_modules(library: Path) -> Iterator[Module]:
    """All that parse, by name; of files with the same text the first."""
    seen: set[str] = set()
    for name, path in sorted((_module_name(path, library), path) for path in library.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(library).parts) or name in LEFT_OUT_MODULES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():  # about escapes in strings of old modules
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if tree.body and text not in seen and not GENERATED.search(text[:GENERATED_WITHIN]):
            seen.add(text)
            yield Module(name, text, tree)


def digests(module: Module) -> Iterator[str]:
    """Of all its functions, whether they make pairs or not."""
    for node in ast.walk(module.tree):
        if isinstance(node, Definition):
            yield digest(node)


def digest(node: Definition) -> str:
    """Equal for functions that differ in comments, blanks and docstrings only."""
    body = _without_docstring(node) or [ast.Pass()]
    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": body})
    return hashlib.sha256(ast.unparse(ast.fix_missing_locations(bare)).encode()).hexdigest()


def pairs(module: Module) -> Iterator[Pair]:
    """Functions of the module and methods of its classes that say what they do and do more than a line."""
    lines = module.text.splitlines(keepends=True)
    for scope, node in _definitions(module.tree, []):
        answer = _answer(node, lines)
        purpose = _purpose(node)
        if answer is not None and len(purpose.split()) >= MIN_WORDS:
            what = "an async Python" if isinstance(node, ast.AsyncFunctionDef) else "a Python"
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            signature = f"`{node.name}({ast.unparse(node.args)}){returns}`"
            place = f"method {signature} of class `{'.'.join(scope)}`" if scope else f"function {signature}"
            instruction = f"Write {what} {place}: {purpose}"
            yield Pair(module.name, ".".join([*scope, node.name]), instruction, answer, digest(node))


def _module_name(path: Path, library: Path) -> str:
    return ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")


def _definitions(node: ast.Module | ast.ClassDef, scope: list[str]) -> Iterator[tuple[list[str], Definition]]:
    for child in node.body:
        if isinstance(child, Definition):
            yield scope, child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, [*scope, child.name])


def _without_docstring(node: Definition) -> list[ast.stmt]:
    return node.body if ast.get_docstring(node) is None else node.body[1:]


def _purpose(node: Definition) -> str:
    """The first paragraph of the docstring, on one line."""
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    return " ".join(re.split(r"\n\s*\n", docstring, maxsplit=1)[0].split())


def _answer(node: Definition, lines: list[str]) -> str | None:
    """The source, decorators and comments included, without the docstring: it is the question.

    None if that leaves nothing worth asking for, or too much.
    """
    rest = _without_docstring(node)
    if len(rest) == len(node.body) or all(_is_trivial(statement) for statement in rest):
        return None
    docstring = node.body[0]
    if docstring.lineno <= node.lineno or rest[0].lineno <= (docstring.end_lineno or 0):
        return None  # shares a line with other code
    start = min((item.lineno for item in node.decorator_list), default=node.lineno) - 1
    head, tail = lines[start : docstring.lineno - 1], lines[docstring.end_lineno : node.end_lineno]
    while tail and not tail[0].strip():
        del tail[0]
    text = textwrap.dedent("".join(head + tail)).rstrip()
    if not MIN_LINES <= text.count("\n") + 1 <= MAX_LINES:
        return None
    try:  # a string that goes on at the margin cannot be dedented with the rest
        (again,) = ast.parse(text).body
    except (SyntaxError, ValueError):
        return None
    return text if isinstance(again, Definition) and digest(again) == digest(node) else None


def _is_trivial(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Raise() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Return(value=None | ast.Constant() | ast.Name(id="NotImplemented")):
            return True
    return False
